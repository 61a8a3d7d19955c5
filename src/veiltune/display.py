"""What a person sees while a session runs: on a terminal a live display, elsewhere a line every few seconds. On stderr.

No text of the owner's is shown but the answer it asked for, and that by the command that asked. A simulated enclave is
named as long as anything is shown.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from veiltune.evaluation import Verification
    from veiltune.evaluation.inspection import Inspection

SIMULATED_LABEL = "SIMULATED ENCLAVE: it protects nothing from this machine's owner"
LINE_SECONDS = 5.0
"""Without a terminal, how long to wait between two lines on the same activity."""
LOG_WIDTH = 160

Fields = Mapping[str, Any]


def console() -> Console:
    """The console people read: stderr, wide enough for a table when it is a file."""
    found = Console(stderr=True, highlight=False)
    return found if found.is_terminal else Console(stderr=True, highlight=False, width=LOG_WIDTH)


class Display:
    """Follows the events of one or more sessions; give it to `run_session` as ``on_event``, inside a ``with``.

    Args:
        screen: where to show.
        title: what runs, in a few words.
        clock: seconds, monotonic.
    """

    def __init__(self, screen: Console, title: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.screen = screen
        self.title = title
        self._clock = clock
        self._begin = clock()
        self._last_line: dict[str, float] = {}
        self._simulated = False
        self._border = ""
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<13}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=screen,
        )
        self._live = (
            Live(get_renderable=self._render, console=screen, refresh_per_second=4) if screen.is_terminal else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        else:
            self._print(self.title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave what is shown on the screen as it is, and show no more of it."""
        if self._live is not None and self._live.is_started:
            self._live.stop()
        self._live = None

    def note(self, line: str) -> None:
        """Show one line of text."""
        (self._live.console if self._live is not None else self.screen).print(Text(line))

    def __call__(self, event: str, fields: Fields) -> None:
        """Take one event of a session. Unknown events are ignored: parties may say more than is shown."""
        handler = getattr(self, f"_on_{event}", None)
        if handler is not None:
            handler(fields)

    # --- events -------------------------------------------------------------------------------------------------------

    def _on_attested(self, fields: Fields) -> None:
        if fields["enclave"] == "simulated" and not self._simulated:
            self._simulated = True
            if self._live is None:
                self._print(SIMULATED_LABEL)

    def _on_provisioned(self, fields: Fields) -> None:
        self._update("loading", fields["block"], fields["num_blocks"], "blocks to their places")

    def _on_key_handed_over(self, _: Fields) -> None:
        self._say("sealed copy", "the enclave opens the model that lies there, with the provider's key")

    def _on_protected(self, fields: Fields) -> None:
        self._update("protecting", fields["block"], fields["num_blocks"], "blocks written")

    def _on_ancestor(self, fields: Fields) -> None:
        self.note(f"{'WARNING: ' if fields['verdict'] != 'not aligned' else ''}the model is {fields['what']}")

    def _on_training(self, fields: Fields) -> None:
        self._update("tuning", 0, fields["total_steps"], f"{fields['examples']} examples")

    def _on_resumed(self, fields: Fields) -> None:
        self.note(f"resuming after step {fields['step']}")

    def _on_agreed(self, fields: Fields) -> None:
        self._say("agreed", f"the provider agrees: session {fields['session']}")

    def _on_emulating(self, fields: Fields) -> None:
        loss = "" if fields["loss"] is None else f"loss {fields['loss']:.4f}"
        self._update("emulator", fields["done"], fields["total"], f"{fields['stage']}  {loss}")

    def _on_warming_up(self, fields: Fields) -> None:
        self._update("warming up", fields["step"], fields["total_steps"], f"dCor {fields['correlation']:.3f}")

    def _on_plugged_in(self, _: Fields) -> None:
        self.note("the provider has put the result into its model")

    def _on_border(self, fields: Fields) -> None:
        self._border = f"  {decimal(fields['bytes'])} over the {fields['border']}"

    def _on_step(self, fields: Fields) -> None:
        note = f"loss {fields['loss']:.4f}  {fields['tokens_per_second']:.0f} tokens/s{self._border}"
        self._update("tuning", fields["step"], fields["total_steps"], note)

    def _on_validation(self, fields: Fields) -> None:
        self.note(f"step {fields['step']}: validation loss {fields['loss']:.4f}")

    def _on_checkpoint(self, fields: Fields) -> None:
        self._say("checkpoint", f"checkpoint of step {fields['step']}")

    def _on_measuring(self, fields: Fields) -> None:
        self._tasks.pop("measuring", None)
        self._say("measuring", f"measuring {fields['when']} tuning: {', '.join(fields['tasks'])}", now=True)

    def _on_scored(self, fields: Fields) -> None:
        self._update("measuring", fields["done"], fields["total"], "answers scored")

    def _on_utility(self, fields: Fields) -> None:
        for task, found in fields["utility"].items():
            line = f"{fields['when']} tuning: {task} {found['metric']} {found['value']:.3f} (n = {found['n']})"
            self.note(line)

    def _on_verifying(self, fields: Fields) -> None:
        self._tasks.pop("loading", None)
        self._say("verifying", f"probing under {fields['design']}", now=True)

    def _on_interrupting(self, fields: Fields) -> None:
        self.note(f"interrupted after step {fields['step']}: saving at the end of this step (again to stop at once)")

    # --- showing ------------------------------------------------------------------------------------------------------

    def _update(self, name: str, done: float, total: float, note: str) -> None:
        if self._live is None:
            self._say(name, f"{name} {done:.0f}/{total:.0f}  {note}", now=done >= total)
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note=note)
        self._progress.update(self._tasks[name], completed=done, total=total, note=note)

    def _say(self, activity: str, line: str, *, now: bool = False) -> None:
        """A line where there is no live display, not too often."""
        if self._live is not None:
            return
        time_now = self._clock()
        if now or time_now - self._last_line.get(activity, -LINE_SECONDS) >= LINE_SECONDS:
            self._last_line[activity] = time_now
            self._print(line)

    def _print(self, line: str) -> None:
        label = " [simulated enclave]" if self._simulated else ""
        self.screen.print(Text(f"{self._clock() - self._begin:7.1f} s{label}  {line}"))

    def _render(self) -> Group:
        parts: list[Any] = [Text(self.title, style="bold")]
        if self._simulated:
            parts.append(Text(SIMULATED_LABEL, style="bold red"))
        return Group(*parts, self._progress)


class ServiceLog:
    """What a service tells people, one line an event; as one JSON object a line on stdout, if asked for.

    A terminal's display would be of no use to whoever reads a service's log.
    """

    def __init__(self, screen: Console, *, as_json: bool) -> None:
        self.screen = screen
        self.as_json = as_json
        self._writing = threading.Lock()

    def __call__(self, event: str, fields: Fields) -> None:
        """Take one event, of any session: each has a thread of its own, and a line must stay whole."""
        line = self._lines.get(event)
        with self._writing:
            if self.as_json:
                print(json.dumps({"event": event, **fields}), flush=True)  # noqa: T201 - asked for
            if line is not None:
                self.screen.print(Text(time.strftime("%H:%M:%S ") + line.format(**fields)))

    _lines: ClassVar[Mapping[str, str]] = {
        "ready": "loaded: {trunk_layers} layers of the trunk",
        "listening": "listening at {address}; {guard}",
        "session_ended": "an owner's session has ended",
        "owner_gone": "an owner went away; what it left was freed",
        "refused": "refused an owner: {why}",
        "turned_away": "turned a connection away: {why}",
        "emulating": "emulator: {stage} {done}/{total}",
    }


def verification_table(verification: Verification) -> Table:
    """Largest errors beside their limits, and whether each keeps to it."""
    result = verification.result
    own = verification.own_condition_number
    table = Table(
        title=Text(f"{result.design} on {result.model}, {result.config['dtype']}: errors against the plain model"),
        caption=Text(
            f"{verification.steps} steps on {verification.shape[0]} x {verification.shape[1]} tokens; "
            f"κ = {verification.condition_number:g} assumed, the keys' own is "
            f"{'unbounded' if own is None else f'{own:g}'}"
            + ("\nSIMULATED enclave" if result.simulated_enclave else "")
        ),
        title_style="bold",
    )
    for name in ("", "largest relative error", "bound c·κ·eps", "ceiling", ""):
        table.add_column(name, justify="right" if name else "left")
    titles = {"adapter": f"adapter after {verification.steps} steps"}
    for check in verification.checks:
        ceiling = "-" if check.ceiling is None else f"{check.ceiling:.1e}"
        verdict = Text("within", style="green") if check.is_within else Text("EXCEEDS", style="bold red")
        name = titles.get(check.quantity, check.quantity)
        table.add_row(name, f"{check.error:.1e}", f"{check.derived:.1e}", ceiling, verdict)
    same = Text("equal", style="green") if verification.greedy_equal else Text("DIFFER", style="bold red")
    table.add_row(f"{verification.greedy_tokens} greedy tokens", "", "", "", same)
    return table


def sees_list(found: Inspection) -> Text:
    """What each observer learns under each design, as an indented list."""
    text = Text()
    for design, observers in found.sees.items():
        for who, lines in observers.items():
            text.append(f"\nunder {design} the {who} sees\n", style="bold")
            text.append("".join(f"  - {line}\n" for line in lines))
    return text
