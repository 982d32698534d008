"""A sequence that makes its members on demand."""

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

Made = TypeVar("Made")


class OnDemand(Sequence[Made]):
    """A sequence whose members are made when they are asked for."""

    def __init__(self, length: int, make: Callable[[int], Made]) -> None:
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Made: ...
    @overload
    def __getitem__(self, index: slice) -> "OnDemand[Made]": ...
    def __getitem__(self, index: int | slice) -> "Made | OnDemand[Made]":
        places = range(self._length)[index]
        if isinstance(places, int):
            return self._make(places)
        return OnDemand(len(places), lambda place: self._make(places[place]))
