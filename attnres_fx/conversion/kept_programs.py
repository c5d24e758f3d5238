"""The programs of further kinds of calls: how many are kept, and which one goes."""

import logging
from typing import Any

from attnres_fx.capture.isolated_run import Mode
from attnres_fx.conversion.adopted_graph import CONSTANTS
from attnres_fx.conversion.captured_program import CapturedProgram
from attnres_fx.conversion.conversion import Conversion

#: Programs that a mode keeps beside the first. Each takes about 1.3 MiB and a third of a second of CPU a layer (llama
#: on CPU), so that 24 of a model of 24 layers are 750 MiB; keywords, flags and sizes rarely come to more.
MOST_PROGRAMS = 24

#: A float argument that was captured with this many values gets a warning.
MANY_VALUES = 4

log = logging.getLogger(__name__)


def keep(model: Any, mode: Mode, program: CapturedProgram) -> None:
    """Keep one more program of a mode; the one that was used longest ago goes where there are too many."""
    conversion: Conversion = model._attnres_conversion
    further = conversion.further.setdefault(mode, [])
    further.insert(0, program)
    if conversion.edits is not None:
        conversion.edits.watch(model, program.watched)
    if len(further) > MOST_PROGRAMS:
        further.pop()
        drop_unused_constants(model)
        conversion.watch_anew(model)
        log.warning(
            "%s: more than %d kinds of calls were captured in %s mode, and the program used longest ago is dropped "
            "(attnres_fx.conversion.kept_programs.MOST_PROGRAMS); ax.compile of the original keeps its Python",
            conversion.report.model,
            MOST_PROGRAMS,
            mode,
        )
    _warn_of_floats(conversion, mode, program)


def note_use(conversion: Conversion, mode: Mode, program: CapturedProgram) -> None:
    """Put a program before those that were used longer ago."""
    further = conversion.further.get(mode, [])
    if program in further and further[0] is not program:
        further.remove(program)
        further.insert(0, program)


def _warn_of_floats(conversion: Conversion, mode: Mode, program: CapturedProgram) -> None:
    programs = (conversion.programs[mode], *conversion.further[mode])
    for name, value in program.signature.constants.items():
        if isinstance(value, float):
            values = {p.signature.constants.get(name) for p in programs}
            if len([v for v in values if isinstance(v, float)]) == MANY_VALUES:
                log.warning(
                    "%s: the argument %r is a float, which is part of a graph, and %d of its values were captured in "
                    "%s mode: pass torch.tensor(%r), which is an input, if it changes from call to call",
                    conversion.report.model,
                    name,
                    MANY_VALUES,
                    mode,
                    value,
                )


def drop_unused_constants(model: Any) -> None:
    """Let go of the constants that only a dropped program held."""
    store = model._modules.get(CONSTANTS)
    if store is None:
        return
    conversion: Conversion = model._attnres_conversion
    programs = [*conversion.programs.values(), *(p for kept in conversion.further.values() for p in kept)]
    graphs = [graph for p in programs for graph in (p.graph, p.lowered.graph)]
    targets = {str(n.target) for g in graphs for n in g.nodes if n.op in ("get_attr", "call_module")}
    used = {t.split(".")[1] for t in targets if t.startswith(f"{CONSTANTS}.")}
    for name in {*store._buffers, *store._modules, *store._parameters} - used:
        delattr(store, name)
