"""The reward of the example: whether a response is the number in the field `answer` of the record."""


def right(prompts: list[str], responses: list[str], records: list[dict]) -> list[float]:
    """1 for the right number and nothing else, 0 for any other text."""
    return [float(text.strip() == str(record["answer"])) for text, record in zip(responses, records, strict=True)]
