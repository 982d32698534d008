"""The error of one record: where it is, what kind of mistake, and what to do."""


class RecordError(ValueError):
    """A record that no stage takes.

    Attributes:
        where: place of the record, such as ``data.jsonl:17``.
        kind: the mistake in two or three words, the same for every record that makes it.
    """

    def __init__(self, where: str, kind: str, message: str) -> None:
        super().__init__(where, kind, message)  # all three, so that the error can be pickled
        self.where, self.kind, self.message = where, kind, message

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"
