"""Print the Markdown tables of a results.json, as they stand in README.md and docs/benchmarks.md.

python benchmarks/table.py runs/quickstart/results.json
"""

import json
import sys
from pathlib import Path

from slipstream.decode.report import markdown_table

if __name__ == "__main__":
    print(markdown_table(json.loads(Path(sys.argv[1]).read_text())))
