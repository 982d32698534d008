"""Which server gets the next request."""

import asyncio
from collections import Counter

from megatron_brain.generation.vllm.spread import Spread


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
