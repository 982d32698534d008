"""Prepared data: items tokenised beforehand by ``tools/preprocess_data.py``, memory-mapped and made on demand.

`PREFIX.json` describes them and is written last: without it there is nothing to read. The items equal those that the
stage would make of the raw records under the length limits that they were prepared with.

`preparation.py` makes them; `read.py` gives them to a stage that they fit; `info.py` reads and writes `PREFIX.json`;
`codecs.py` turns items into documents; `documents.py` turns documents into files; `statistics.py` makes statistics.
"""
