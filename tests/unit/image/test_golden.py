"""Recorded measurements, of files built here and of real ones.

Goal: a change of any MRENCLAVE fails a test.  ``--update-golden`` records them again.  The project
may not distribute real signed files; set ``SOFTSGX_ENCLAVES`` to a directory of them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.support.enclave_files import (
    blob_plan,
    key,
    oe_file,
    raw_file,
    sdk_laid_out,
    sdk_library,
    selftest_file,
    sgxs_file,
)

from softsgx.image import Bytes, measure, read_image, sign_plan
from softsgx.image.sdk import SdkLayout, lay_out_sdk

GOLDEN = Path(__file__).parents[2] / "golden" / "measurements.json"
_REAL = os.environ.get("SOFTSGX_ENCLAVES", "")


def _sdk(**sizes: object) -> bytes:
    layout = SdkLayout(**sizes)  # type: ignore[arg-type]
    return lay_out_sdk(Bytes("sdk", sdk_library().data), layout)


def _files() -> dict[str, bytes]:
    return {
        "sgxs": sgxs_file(),
        "raw": raw_file(),
        "selftest": selftest_file().data,
        "sdk": bytes(sdk_laid_out().view),
        "sdk, defaults": _sdk(),
        "sdk, 1.3": _sdk(versions=((3, 3), (1, 3)), stack_max=4),
        "sdk, two pages of SSA": _sdk(ssa_frame_size=2, threads=8, heap_max=1 << 16),
        "oe": oe_file(),
    }


def test_files_measure_as_on_record(update_golden: bool) -> None:
    got = {
        name: measure(read_image(Bytes(name, data)).plan).hex() for name, data in _files().items()
    }
    got["SIGSTRUCT"] = sign_plan(blob_plan(), key()).pack()[512:1040].hex()
    if update_golden:
        GOLDEN.write_text(json.dumps(got, indent=2) + "\n")
    assert got == json.loads(GOLDEN.read_text())
