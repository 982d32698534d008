"""The whole report: its files, its figures and its page."""

import base64
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from helpers.run_folders import TEXTS, rows_of, training_lines, write_run

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")

import report

FIGURES = {"frontier", "frontier_end", "distance", "win_rates", "judge_against_reward", "by_samples_per_prompt"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a report of three settings with two seeds each."""
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out") / "report"
    columns = {
        "reward__plain": [1.0, 1.2, 1.1, 0.9],
        "posterior__prior_reward": [0.5, 0.6, 0.4, 0.5],
        "posterior__reward": [2.0, 2.1, 1.9, 2.0],
        "posterior__kl_to_prior": [0.6, 0.7, 0.8, 0.7],
        "posterior__kl_to_policy": [0.3, 0.2, 0.1, 0.2],
    }
    for samples in (2, 8, 16):
        for seed in (0, 1):
            write_run(
                work,
                f"n{samples}",
                seed,
                label=f"n = {samples} & <more>",
                settings={"--samples-per-prompt": str(samples), "--baseline": "none"},
                rows=rows_of([1.0, 0.1 * samples, 0.2 * seed, -1.0], **columns),
                lines=training_lines(shift=0.01 * samples + 0.1 * seed),
            )
    write_run(work, "late", 0, evaluation=False)
    assert report.main([str(work), "--out", str(out), "--title", "Title & <more>", "--examples", "3"]) == 0
    return out


def text_of(svg):
    return re.sub(r"\s+", " ", " ".join(re.findall(r">([^<]+)<", svg)))


def test_every_figure_is_there_in_both_forms_and_not_empty(made):
    files = {path.name for path in (made / "figures").iterdir()}
    assert files == {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    for name in FIGURES:
        data = (made / "figures" / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 10_000


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("frontier", ["KL to the prior (nats)", "reward above the prior's, held-out prompts", "posterior"]),
        ("frontier_end", ["KL to the prior (nats)", "reward of samples of temperature 1", "posterior"]),
        ("distance", ["training step", "KL(posterior ‖ policy) (nats)", "KL(alpha ‖ beta) (nats)"]),
        ("win_rates", ["win-rate: reward, vs SFT", "win-rate: reward, vs human", "win-rate: judge, vs SFT"]),
        ("judge_against_reward", ["training reward above the prior's, held-out prompts", "judge above the prior's"]),
        ("by_samples_per_prompt", ["--samples-per-prompt", "16", "KL(posterior ‖ policy)"]),
    ],
)
def test_figures_name_their_axes_and_settings(made, name, labels):
    shown = text_of((made / "figures" / f"{name}.svg").read_text())
    settings = [] if name.startswith("by_") else [f"n = {samples} &amp; &lt;more&gt;" for samples in (2, 8, 16)]
    assert [label for label in (*labels, *settings) if label not in shown] == []


def test_settings_differ_in_line_and_marker_not_in_colour_alone():
    from reports.figures import _style

    looks = [(str(_style(place)["linestyle"]), _style(place)["marker"]) for place in range(40)]
    assert len(set(looks)) == 40


class Page(HTMLParser):
    """Links, images, scripts and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.places, self.tags, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.places += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_needs_no_other_file_and_no_script(made):
    text = (made / "report.html").read_text()
    page = Page(text)
    assert len(page.places) == 1 + len(FIGURES) and all(place.startswith("data:") for place in page.places)
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    assert "url(" not in text and "@import" not in text
    for place in page.places[1:]:
        svg = base64.b64decode(place.partition("base64,")[2]).decode()
        assert "<script" not in svg and re.findall(r'(?:href|src)="(?!#|data:)([^"]*)"', svg) == []


def test_the_page_escapes_prompts_answers_labels_and_title(made):
    text = (made / "report.html").read_text()
    assert "<script>" not in text and "<b>prompt" not in text and "<more>" not in text
    texts = Page(text).texts
    assert "Title & <more>" in texts and TEXTS[1] in texts and "n = 8 & <more>" in texts
    assert "answer 1 <script>alert(1)</script>" in texts


def test_the_page_shows_every_answer_to_the_first_prompts_with_its_scores(made):
    texts = Page((made / "report.html").read_text()).texts
    assert TEXTS[2] in texts and TEXTS[3] not in texts  # --examples 3
    start = texts.index(TEXTS[1])
    shown = [each.strip() for each in texts[start : texts.index(TEXTS[2])] if each.strip()]
    assert shown[1:4] == ["Human reference", "human 1", "reward 1.000"]
    assert shown[4:7] == ["SFT model", "plain 1", "reward 0.000, judge 0.250"]
    policies = [shown.index(f"n = {samples} & <more>") for samples in (2, 8, 16)]
    assert [shown[place + 2] for place in policies] == [f"reward {r}, judge 0.250" for r in ("0.200", "0.800", "1.600")]


def test_what_is_left_out_and_the_commands_are_on_the_page(made):
    for name in ("report.html", "report.md"):
        text = (made / name).read_text()
        assert "late/seed0 has no evaluation.json" in text
    assert "python -m megatron_brain brain --save &#39;a folder&#39;" in (made / "report.html").read_text()


def test_the_figures_of_the_markdown_page_lie_beside_it(made):
    places = re.findall(r"!\[.*\]\((.*)\)", (made / "report.md").read_text())
    assert len(places) == len(FIGURES) and all((made / place).is_file() for place in places)


def test_figures_without_numbers_are_left_out_and_named(tmp_path, capsys):
    write_run(tmp_path / "work")
    out = tmp_path / "out"
    assert report.main([str(tmp_path / "work"), "--out", str(out)]) == 0
    assert {path.stem for path in (out / "figures").iterdir()} == {"win_rates"}
    said = capsys.readouterr().err
    for figure in ("frontier along training", "distance to the posterior", "judge against reward"):
        assert f"no figure of {figure}" in said or f"no figure of the {figure}" in said
    assert "label of one is not in the figures along training: no metrics.jsonl of seed 0" in said
    assert said.replace("note: ", "").splitlines()[0] in Page((out / "report.html").read_text()).texts


def test_a_setting_without_the_posterior_is_in_the_frontier_at_the_end(tmp_path):
    write_run(tmp_path, rows=rows_of([1.0, 2.0, 3.0, 4.0], reward__plain=[1.0, 2.0, 3.0, 4.0]))
    assert report.main([str(tmp_path / "baseline"), "--out", str(tmp_path / "out")]) == 0
    shown = text_of((tmp_path / "out" / "figures" / "frontier_end.svg").read_text())
    assert "label of one" in shown and "posterior" not in shown


def figures_of(work, folder):
    """Matplotlib's axes of each figure by its name, as they were drawn, and captions by name."""
    from reports import figures
    from reports.findings import find
    from reports.runs import read_settings

    drawn = {}

    def keep(figure, axes, _, name, caption):
        drawn[name] = axes
        figures.pyplot.close(figure)
        return figures.Figure(name, caption)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_finish", keep)
        made, notes = figures.draw_all(find(read_settings([work])[0], None), folder)
    return drawn, {figure.name: figure.caption for figure in made}, notes


def test_rewards_along_training_are_above_the_prior_of_their_seed(tmp_path):
    """Seeds whose reward models have other zeros give the same points."""
    for seed, zero in ((0, 0.0), (1, 50.0)):
        write_run(tmp_path / "work", seed=seed, lines=training_lines(shift=zero))
    axes, _, _ = figures_of(tmp_path / "work", tmp_path)
    for name in ("frontier", "judge_against_reward"):
        (axis,) = axes[name]
        line = axis.lines[0]
        rewards = line.get_ydata() if name == "frontier" else line.get_xdata()
        assert list(rewards) == pytest.approx([-0.1, 0.3, 0.7])
    (frontier,) = axes["frontier"]
    star = next(line for line in frontier.lines if line.get_marker() == "*")
    assert star.get_ydata()[0] == pytest.approx(1.3)
    # The range of the seeds is nothing, once their zeros are gone.
    segments = [segment for bars in frontier.collections for segment in bars.get_segments()]
    assert segments and max(abs(segment[0] - segment[-1]).max() for segment in segments) < 1e-9


def test_the_caption_of_the_frontier_has_the_number_of_prompts_of_the_validations(tmp_path):
    commands = [["x", "sft", "--max-valid-records", "300"], ["x", "brain", "--max-valid-records", "32"]]
    write_run(tmp_path / "work", lines=training_lines(), commands=commands)
    assert "at most 32 prompts" in figures_of(tmp_path / "work", tmp_path)[1]["frontier"]


def test_the_frontier_at_the_end_is_over_the_prompts_that_all_its_settings_have_and_bounds_are_open(tmp_path):
    policy = rows_of([1.0, 1.0, 1.0, 1.0], reward__plain=[1.0, 2.0, 3.0, 70.0])
    best = rows_of([1.0, 1.0, 1.0, 1.0], reward__plain=[4.0, 5.0, 6.0, 7.0], kl_to_prior_at_most=[1.3] * 4)[:3]
    write_run(tmp_path / "work", "policy", rows=policy)
    write_run(tmp_path / "work", "best", rows=[{k: v for k, v in row.items() if k != "kl_to_prior"} for row in best])
    axes, captions, _ = figures_of(tmp_path / "work", tmp_path)
    (axis,) = axes["frontier_end"]
    points = {line.get_ydata()[0]: line for line in axis.lines if line.get_marker() in ("o", "s")}
    assert set(points) == {2.0, 5.0} and "the same 3 prompts" in captions["frontier_end"]
    assert points[5.0].get_markerfacecolor() == "none" and points[2.0].get_markerfacecolor() != "none"
    assert points[5.0].get_xdata()[0] == pytest.approx(1.3) and "a bound" in captions["frontier_end"]


def test_the_report_says_whether_the_distance_was_still_falling(tmp_path):
    from reports.runs import read_settings
    from reports.tables import _of_endings

    worse = [
        {"iteration": at, "validation/posterior_kl_to_policy": value} for at, value in ((0, 1.0), (4, 0.9), (8, 1.25))
    ]
    write_run(tmp_path, "falls", 0, lines=training_lines())
    write_run(tmp_path, "falls", 1, lines=worse)
    write_run(tmp_path, "rises", 0, lines=worse)
    (table,) = _of_endings(read_settings([tmp_path])[0])
    rows = {row[0]: row[1:] for row in table.rows}
    # falls: (1 + 1) / 2, (0.6 + 0.9) / 2, (0.2 + 1.25) / 2
    assert rows["label of falls"] == ["1.000 (0)", "0.750 (4)", "0.725 (8)", "-0.025", "still falling in 1 of 2 seeds"]
    assert rows["label of rises"][3:] == ["+0.350", "not falling in any seed; not below the start"]


def test_a_mistake_is_one_message(tmp_path, capsys):
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: no finished run")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif("BROWSER_TESTS" not in os.environ, reason="BROWSER_TESTS=1 opens the page in a headless Chromium")
def test_a_real_browser_shows_the_page_without_an_error(made, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert browser is not None, "no Chromium on PATH: apt-get install chromium"
    # A script of the test itself says how far everything reaches on a narrow screen, and whether all images are there.
    probe = (
        "<script>addEventListener('load', () => { const images = [...document.images];"
        "document.title = JSON.stringify([images.length, images.every(i => i.naturalWidth > 0),"
        "document.documentElement.scrollWidth <= innerWidth]); console.info('probe ran'); })</script></body>"
    )
    page = tmp_path / "page.html"
    page.write_text((made / "report.html").read_text().replace("</body>", probe))
    ran = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"),
            *("--enable-logging=stderr", "--v=0", "--window-size=500,900", "--virtual-time-budget=2000", "--dump-dom"),
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    assert len(console) == 1 and "probe ran" in console[0]
    assert re.search(r"<title>(.*?)</title>", ran.stdout)[1] == f"[{len(FIGURES)},true,true]"
