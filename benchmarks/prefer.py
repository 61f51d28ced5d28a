"""`python -m benchmarks.prefer RESULT.json`: writes which of `cuda` and `triton` was faster into the table that the package ships.

Run it by hand after `make gpu` on a new card; plain calls decide, not graph replays, because that is how most users call.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

TABLE = Path(__file__).parent.parent / "beniful_fast/ops/preferred.json"


def preferences(result: dict[str, dict[str, dict]]) -> dict[str, str]:
    """{op/dtype/bucket: backend}; where cases share a key, the one with the smaller product of times."""
    times: dict[str, dict[str, list[float]]] = {}
    for case in result["cases"].values():
        for name in ("cuda", "triton"):
            if name in case["candidates"]:
                times.setdefault(case["key"], {}).setdefault(name, []).append(
                    case["candidates"][name].get("median", math.inf)
                )  # failed: never preferred
    complete = {key: sides for key, sides in times.items() if len({len(values) for values in sides.values()}) == 1}
    return {key: min(sides, key=lambda name: math.prod(sides[name])) for key, sides in complete.items()}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.prefer benchmarks/results/gpu-....json")
    result = json.loads(Path(sys.argv[1]).read_text())
    table = json.loads(TABLE.read_text())
    table.setdefault(result["machine"]["gpus"][0]["name"], {}).update(preferences(result))
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"written to {TABLE}")


if __name__ == "__main__":
    main()
