"""A judge for tests. The score is the share of the reference's words that a response has."""


def score(prompts: list[str], responses: list[str], references: list[str]) -> list[float]:
    return [
        len(set(response.split()) & set(reference.split())) / len(set(reference.split()))
        for response, reference in zip(responses, references, strict=True)
    ]
