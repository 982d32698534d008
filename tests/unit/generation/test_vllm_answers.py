"""Which answers of a server are taken for a response."""

import asyncio

import pytest
from helpers.stub_json import StubJson

from megatron_brain.config.stages import SamplingConfig
from megatron_brain.generation.batch import Completion
from megatron_brain.generation.vllm import answers
from megatron_brain.generation.vllm.client import Server, UnavailableError

URL, PROMPT, EOS = "http://server:8000", (3, 4, 5), 7


def choice(tokens, logprobs=None, reason="length", **changes):
    logprobs = [-0.5] * len(tokens) if logprobs is None else logprobs
    answer = {
        "token_ids": tokens,
        "prompt_token_ids": list(PROMPT),
        "finish_reason": reason,
        "logprobs": {"token_logprobs": logprobs},
    }
    return answer | changes


def read(answer, temperature=1.0):
    sampling = SamplingConfig(max_new_tokens=3, temperature=temperature)
    return answers.read_completion(URL, answer, PROMPT, sampling=sampling, eos_id=EOS, vocab_size=20)


def test_a_response_ends_with_eos_or_is_as_long_as_it_may_be():
    assert read(choice([8, 9, 10])) == Completion(tokens=(8, 9, 10), token_logprobs=(-0.5,) * 3, finished=False)
    assert read(choice([8, 7], reason="stop")) == Completion(tokens=(8, 7), token_logprobs=(-0.5,) * 2, finished=True)
    assert read(choice([8, 9, 7], reason="stop")).finished


def test_a_greedy_response_has_log_probability_0_as_the_native_engine_says():
    assert read(choice([8, 9, 10]), temperature=0.0).logprob == 0.0


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (choice([]), "answered with no tokens"),
        (choice(None, []), "answered with no tokens"),
        (choice([8, 9]), "after 2 of 3 tokens without EOS"),
        (choice([8, 9, 10, 11]), "went on after 3 tokens"),
        (choice([7, 9, 10]), "went on after 3 tokens or after EOS"),
        (choice([8, 9, 10], reason="stop"), "only EOS .* may stop it"),
        (choice([8, 7], reason="length"), "only EOS .* may stop it"),
        (choice([8, 9, 20]), "token 20, and the run's vocabulary has 20 tokens"),
        (choice([8, 9, "x"]), "answered with token x"),
        (choice([8, 9, 10], [-0.5, -0.5]), "3 tokens and the log-probabilities of 2"),
        (choice([8, 9, 10], logprobs=[-0.5, None, -0.5]), "the log-probability None"),
        (choice([8, 9, 10], logprobs=[-0.5, float("-inf"), -0.5]), "the log-probability -inf"),
        (choice([8, 9, 10], logprobs=[-0.5, 0.1, -0.5]), "the log-probability 0.1"),
        (choice([8, 9, 10]) | {"logprobs": None}, "the log-probabilities of 0"),
        (choice([8, 9, 10], prompt_token_ids=[3, 4]), "answered the prompt .*was asked"),
        (choice([8, 9, 10], prompt_token_ids=None), "returns no token ids"),
    ],
)
def test_other_answers_name_the_server_and_what_is_wrong(answer, said):
    with pytest.raises(answers.AnswerError, match=f"{URL}: .*{said}"):
        read(answer)


def test_prompt_logprobs_are_those_of_the_prompts_tokens():
    rows = [None, {"4": {"logprob": -1.0}, "9": {"logprob": -0.1}}, {"5": {"logprob": -2.0}}]
    assert answers.read_prompt_logprobs(URL, choice([8], prompt_logprobs=rows), PROMPT) == [-1.0, -2.0]
    for other in (None, rows[:2], [None, {"9": {"logprob": -1.0}}, rows[2]]):
        with pytest.raises(answers.AnswerError, match="log-probability for each token"):
            answers.read_prompt_logprobs(URL, choice([8], prompt_logprobs=other), PROMPT)


def test_what_a_server_says_of_an_error_is_one_line():
    assert answers.error_text('{"error": {"message": "too\\nlong"}}') == "too long"
    assert answers.error_text('{"detail": "Not Found"}') == "Not Found"
    assert answers.error_text("<html>Bad gateway</html>") == "<html>Bad gateway</html>"
    assert len(answers.error_text("x" * 1000)) == 400


def test_a_server_whose_restart_could_not_be_seen_is_refused():
    assert answers.read_start_time(URL, "# TYPE x\nprocess_start_time_seconds 1.79613054605e+09\n") == 1796130546.05
    with pytest.raises(answers.AnswerError, match="--api-server-count 1"):
        answers.read_start_time(URL, "process_cpu_seconds_total 3\n")


def test_what_is_no_vllm_server_is_told():
    for body in ({}, {"data": []}, {"data": [{"id": "x"}]}):
        with pytest.raises(answers.AnswerError, match="is it a vLLM server"):
            answers.read_served(URL, body)
    with pytest.raises(answers.AnswerError, match="is it a vLLM server"):
        answers.read_choice(URL, {"choices": []})


def test_an_answer_that_cannot_be_decoded_is_one_that_may_come_later():
    async def pause(url):
        async with Server(url, request_timeout=20, slow_timeout=20, connections=1) as server:
            await server.pause()

    def garbled(number, request):
        return 200, "no gzip", {"content-encoding": "gzip"}

    with StubJson(garbled) as stub, pytest.raises(UnavailableError, match="/pause: DecodingError"):
        asyncio.run(pause(stub.url))
