"""Recording which pages of enclaves a program uses: the part of the engine behind ``record``.

=================== ===============================================================
:mod:`.pagers`       pagers that report the first use of each page
:mod:`.page_table`   reports uses by the program and by leaves to the recorder
:mod:`.recorder`     which uses are accesses, and what the trace gets of them
:mod:`.recording`    when intervals end
:mod:`.starved`      threads for which an interval waits
=================== ===============================================================

Nothing here is imported in a run that does not record.
"""

from typing import TYPE_CHECKING

from softsgx.ondemand import on_demand

if TYPE_CHECKING:
    from softsgx.engines.native.recording.page_table import RecordedPageTable
    from softsgx.engines.native.recording.pagers import RecordedMprotectPager, RecordedUffdPager
    from softsgx.engines.native.recording.recorder import Recorder
    from softsgx.engines.native.recording.recording import Recording

__all__ = [
    "RecordedMprotectPager",
    "RecordedPageTable",
    "RecordedUffdPager",
    "Recorder",
    "Recording",
]

__getattr__ = on_demand(
    __name__,
    {
        "page_table": ("RecordedPageTable",),
        "pagers": ("RecordedMprotectPager", "RecordedUffdPager"),
        "recorder": ("Recorder",),
        "recording": ("Recording",),
    },
)
