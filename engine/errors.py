"""How a run ends: exit codes and the two exceptions that carry them."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from difflib import get_close_matches
from typing import Final

FINISHED: Final = 0
FAILED: Final = 1
USER_ERROR: Final = 2
DISKS: Final = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EBUSY, errno.EIO}  # it is the disk, not us
INTERRUPTED: Final = "interrupted; what was saved before is kept"
PREEMPTED: Final = 75  # EX_TEMPFAIL: run the same command again to go on


class UserError(Exception):
    """Input that only the user can mend: one sentence with what is wrong, where, and what to do."""


class Preempted(Exception):
    """The run was asked to stop and left a checkpoint."""


class RunFailed(Exception):
    """The run cannot go on and says why; what it wrote before is sound."""


def exit_code(run: Callable[[], object]) -> int:
    """Run a command and turn how it ended into a process exit code; anything unforeseen keeps its traceback."""
    try:
        run()
    except UserError as error:
        print(f"miram: {one_line(str(error))}", file=sys.stderr)
        return USER_ERROR
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileNotFoundError, FileExistsError) as error:
        print(f"miram: {error.filename}: {error.strerror}; name another place, or mend this one", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        if error.errno not in DISKS:
            raise
        print(f"miram: {error.filename or 'writing'}: {error.strerror}; what was finished is kept", file=sys.stderr)
        return FAILED
    except Preempted as stop:
        if os.environ.get("RANK", "0") == "0":  # the same on all ranks
            print(f"miram: {one_line(str(stop))}", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        print(f"miram: {INTERRUPTED}", file=sys.stderr)
        return FAILED
    except RunFailed as failure:
        print(f"miram: {one_line(str(failure))}", file=sys.stderr)
        return FAILED
    return FINISHED


def one_line(text: str) -> str:
    """The text with every run of white space made a single blank."""
    return " ".join(text.split())


FEW = 30  # names that a sentence can list


def did_you_mean(word: str, known: list[str]) -> str:
    """`; did you mean X?` for the nearest known name, else the list of them."""
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if len(known) <= FEW else ""
