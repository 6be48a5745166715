"""MemoryReport: the memory of a run by class, and the changes that save the most.

The bytes that a change saves, with P parameters, G gradients, S optimizer state, A the micro-batch
(activations and temporary tensors), on n ranks:

half a micro-batch          A / 2, or simulated
activation checkpointing    simulated, else A (1 - 1 / blocks)
zero3, zero1                (1 - 1 / n) (P + G + S), (1 - 1 / n) (G + S)
LoRA                        nearly G + S
16 bits                     A / 2
half the tokens             A / 2
"""

from dataclasses import dataclass, field

from rich.console import Group
from rich.table import Table

MAX_CHANGES = 3


@dataclass(frozen=True)
class Change:
    """A change that saves memory: what it is, the bytes it saves, and how to make it.

    Attributes:
        name: in words.
        saved_bytes: estimated.
        hint: for a script.
        flag: for the command line.
    """

    name: str
    saved_bytes: int
    hint: str
    flag: str


@dataclass
class MemoryReport:
    """An out-of-memory error, explained.

    Attributes:
        title: what happened, in which phase and step.
        measured: bytes by class, counted or read from the allocator; None if unknown.
        estimated: bytes by class that the step needs; None if unknown.
        changes: those that help, the largest saving first.
        notes: further lines.
    """

    title: str
    measured: dict[str, int | None] = field(default_factory=dict)
    estimated: dict[str, int | None] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def top_changes(self) -> list[Change]:
        """Return the three changes that save most."""
        ranked = sorted(self.changes, key=lambda change: -change.saved_bytes)
        return [change for change in ranked if change.saved_bytes > 0][:MAX_CHANGES]

    def render(self, uses_flags: bool) -> Group:
        """Return the report as tables.

        Args:
            uses_flags: whether changes are written as flags, else as Python.
        """
        # imported here, because it imports the simulation, which few runs need
        from .estimate import format_bytes

        table = Table("", "measured", "estimated")
        for name in dict.fromkeys([*self.measured, *self.estimated]):
            values = (self.measured.get(name), self.estimated.get(name))
            table.add_row(name, *("-" if v is None else format_bytes(v) for v in values))
        changes = Table("what helps", "saves about", "type" if uses_flags else "use")
        for change in self.top_changes():
            typed = change.flag if uses_flags else change.hint
            changes.add_row(change.name, format_bytes(change.saved_bytes), typed)
        return Group(self.title, table, *([changes] if self.top_changes() else []), *self.notes)
