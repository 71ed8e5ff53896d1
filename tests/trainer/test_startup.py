"""The account of a start-up: what is said of the time before the process, and of its own."""

import time

import pytest

from launcher.process import born
from trainer.config import UserError
from trainer.startup import Startup


def test_each_moment_is_counted_from_the_one_before():
    begin = born()
    said = f"submitted={begin - 100:.2f},driver={begin - 40:.2f},srun={begin - 38:.2f}"
    startup = Startup({"FOVEATE_STARTED": said})
    startup.reached("imports")
    startup.reached("first_step")
    seconds = startup.seconds()
    assert list(seconds) == ["driver", "srun", "python", "imports", "first_step", "total"]
    assert seconds["driver"] == pytest.approx(60, abs=0.1)
    assert seconds["srun"] == pytest.approx(2, abs=0.1)
    assert seconds["python"] == pytest.approx(38, abs=0.5), "born() is that exact"
    assert seconds["imports"] == pytest.approx(time.time() - begin, abs=5)
    assert seconds["total"] == pytest.approx(100 + time.time() - begin, abs=5)


def test_a_process_that_was_started_by_hand_begins_with_itself():
    startup = Startup({})
    startup.reached("imports")
    assert list(startup.seconds()) == ["imports", "total"]


def test_clocks_that_differ_make_no_negative_times():
    startup = Startup({"FOVEATE_STARTED": f"submitted={time.time() + 1000:.2f}"})
    assert startup.seconds()["python"] == 0


@pytest.mark.parametrize("text", ["soon", "driver=", "driver=1.5;srun=2", "step=-3"])
def test_a_text_that_is_no_list_of_moments_is_refused(text):
    with pytest.raises(UserError, match=r"FOVEATE_STARTED holds .*: expected name=seconds"):
        Startup({"FOVEATE_STARTED": text})
