"""Prepared data: items tokenised beforehand by ``tools/preprocess_data.py``, memory-mapped and made on demand.

`PREFIX.json` says what they are, and is written last: without it there is nothing to read. The items equal those that
the stage would make of the raw records, but that the length limits are the ones they were prepared with.

`preparation.py` makes them; `read.py` gives them to a stage they fit; `info.py` is `PREFIX.json`; `codecs.py` turns
items into documents, `documents.py` documents into files; `statistics.py` numbers about them.
"""
