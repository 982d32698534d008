"""Which server gets the next request."""

import asyncio
from collections import Counter

from megatron_brain.generation.vllm.spread import Request, Spread, Waiting


def opened(count, **options):
    async def make():
        spread = Spread(count, **{"most": 2, "first": 0} | options)
        for server in range(count):
            await spread.reopen(server)
        return spread

    return make()


def test_the_server_with_the_fewest_requests_gets_the_next_beginning_with_the_first():
    async def main():
        spread = await opened(3, first=1)
        taken = [await spread.take() for _ in range(4)]
        await spread.give_back(2)
        return [*taken, await spread.take()]

    assert asyncio.run(main()) == [1, 2, 0, 1, 2]


def test_no_server_gets_more_than_its_places_and_who_waits_gets_a_place_that_is_given_back():
    async def main():
        spread = await opened(2)
        taken = Counter([await spread.take() for _ in range(4)])
        waiting = asyncio.create_task(spread.take())
        await asyncio.sleep(0)
        assert not waiting.done()
        await spread.give_back(1)
        return taken, await waiting

    assert asyncio.run(main()) == ({0: 2, 1: 2}, 1)


def test_a_closed_server_gets_no_request_until_it_is_opened_again():
    async def main():
        spread = await opened(2)
        spread.close(0)
        taken = [await spread.take() for _ in range(2)]
        waiting = [asyncio.create_task(spread.take()) for _ in range(2)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        await spread.reopen(0)
        return taken, await asyncio.gather(*waiting)

    assert asyncio.run(main()) == ([1, 1], [0, 0])


def requests(*counts):
    """Responses to prompts (0,), (1,), ...: so many to each."""
    prompts = [(prompt,) for prompt, count in enumerate(counts) for _ in range(count)]
    return [Request(place=place, prompt=prompt, seed=place) for place, prompt in enumerate(prompts)]


def test_a_server_gets_all_responses_of_a_prompt_and_then_a_prompt_that_nobody_has_begun():
    waiting = Waiting(requests(2, 2, 2))
    taken = [(server, waiting.take(server).prompt[0]) for server in (0, 1, 1, 0, 1, 1)]
    assert taken == [(0, 0), (1, 1), (1, 1), (0, 0), (1, 2), (1, 2)]
    assert not waiting


def test_a_server_without_a_prompt_helps_with_the_one_that_has_most_left():
    waiting = Waiting(requests(2, 4))
    assert [waiting.take(server).prompt for server in (0, 1)] == [(0,), (1,)]
    assert [waiting.take(2).place for _ in range(2)] == [3, 4], "the prompt of server 1 has three left"
    assert sorted(waiting.take(server).place for server in (0, 1)) == [1, 5]
    assert not waiting


def test_equal_prompts_go_to_one_server_and_every_request_is_given_once():
    asked = [Request(place=place, prompt=(place % 3,), seed=0) for place in range(30)]
    waiting, places, servers = Waiting(asked), [], {}
    while waiting:
        server = len(places) % 3
        request = waiting.take(server)
        places.append(request.place)
        servers.setdefault(request.prompt, set()).add(server)
    assert sorted(places) == list(range(30))
    assert all(len(of_prompt) == 1 for of_prompt in servers.values())
