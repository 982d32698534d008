"""Rewards of named answers to a prompt: what is scored, and what a row gets."""

from types import SimpleNamespace

from megatron_brain.data.records import Prompt
from megatron_brain.stages.comparison import add_rewards


def rewarded(**parts):
    """The row, and the rollout that was scored. A part gives the length of an answer times its factor."""
    prompt = Prompt(tokens=(5, 6), text="2+2=", reference="four", record_id="d:1", fields={"answer": 4})
    row, asked = {"policy": "4", "baseline": "five", "reference": "4"}, []

    def score(steps, scale):
        for [[part]] in steps:
            asked.append(part.rollout)
            for response in part.rollout.responses:
                response.reward_parts = {name: float(len(response.text) * factor) for name, factor in parts.items()}
                response.reward = sum(response.reward_parts.values())

    rewards = SimpleNamespace(score=score, parts=[SimpleNamespace(name=name) for name in parts])
    add_rewards(rewards, None, [row], {3: prompt}, [{"policy": (4,), "baseline": (5, 0), "reference": (4,)}])
    return row, asked[0]


def test_answers_are_scored_with_text_and_record_and_equal_ones_once():
    _, rollout = rewarded(rm=1)
    assert rollout.record == {"id": "d:1", "answer": 4, "completion": "four"}
    assert (rollout.index, rollout.prompt, rollout.prompt_tokens) == (3, "2+2=", (5, 6))
    assert [(response.tokens, response.text) for response in rollout.responses] == [((4,), "4"), ((5, 0), "five")]


def test_a_row_gets_the_reward_and_each_part_where_there_are_several():
    row, _ = rewarded(rm=1)
    assert {name: value for name, value in row.items() if "reward/" in name} == {
        "reward/policy": 1.0,
        "reward/baseline": 4.0,
        "reward/reference": 1.0,
    }
    row, _ = rewarded(rm=10, rule=1)
    assert (row["reward/baseline"], row["reward/rm/baseline"], row["reward/rule/baseline"]) == (44.0, 40.0, 4.0)
