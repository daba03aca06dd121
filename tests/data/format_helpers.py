"""Documents with all that a format may garble, and a reader of whole files."""

import json
from pathlib import Path

from jaxtrain.data.prepare.documents import plan_units, read_documents
from jaxtrain.data.prepare.sources import find_sources

TEXTS = ["one", "two words\n" * 30, "é 漢字 👍", "", 'a "quoted", text', "line\r\nends\n", "\ufeffinner mark", "last"]


RECORDS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]


JSON_LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)


def read(path: Path, text_field: str = "text", unit_bytes: int = 1 << 25) -> list[str]:
    units = plan_units(find_sources([str(path)])[0], unit_bytes)
    documents = [document for unit in units for _, document in read_documents(unit, text_field)]
    return [document if isinstance(document, str) else "".join(document) for document in documents]
