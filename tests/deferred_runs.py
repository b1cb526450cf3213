"""Runs whose steps are read when the next one is under way, on a CPU, and their twins that look at every step."""

from __future__ import annotations

import json
import math

from training_runs import run_here

from minilm.data.loader import Loader
from minilm.errors import MinilmError
from minilm.training import step, trainer
from minilm.training.layout import Layout

WAITS_ON = ("cuda", "cpu")
TIMES = ("unix_seconds", "seconds", "tokens_per_second", "memory/", "mfu")


class Batches:
    """Puts accidents into the steps of given global batches, whenever one comes, and notes what became of each.

    accidents  number of a global batch -> "loss" (the hidden states are infinite), "gradient" (nan, under a finite
               loss), "logged loss" (infinite, over a finite gradient), or a function of the layout, called before it
    steps      (number, what the step returned or raised) in the order in which they were begun
    """

    def __init__(self, patch, accidents=None):
        self.accidents, self.steps = accidents or {}, []
        self._real, self._number = trainer.optimizer_step, -1
        following = Loader.__next__

        def noted(loader):
            self._number = loader.next_step
            return following(loader)

        patch.setattr(Loader, "__next__", noted)
        patch.setattr(trainer, "optimizer_step", self._step)

    def _step(self, layout, batches, **keywords):
        what, number = self.accidents.get(self._number), self._number
        undo = self._plant(layout, what)
        try:
            result = self._real(layout, batches, **keywords)
        except BaseException as error:
            self.steps.append((number, type(error).__name__))
            raise
        finally:
            undo()
        self.steps.append((number, type(result).__name__))
        return result

    def _plant(self, layout, what):
        model = layout.model
        if what == "loss":
            forward = model.forward

            def infinite(*arguments, **keywords):
                output = forward(*arguments, **keywords)
                output.hidden = output.hidden * math.inf
                return output

            model.forward = infinite
            return lambda: setattr(model, "forward", forward)
        if what == "gradient":
            return next(model.parameters()).register_hook(lambda gradient: gradient * math.nan).remove
        if what == "logged loss":
            accumulate = step.accumulate

            def accumulated(*arguments, **keywords):
                loss, auxiliary = accumulate(*arguments, **keywords)
                return loss._replace(nats=loss.nats * math.inf), auxiliary

            step.accumulate = accumulated
            return lambda: setattr(step, "accumulate", accumulate)
        if what is not None:
            what(layout)
        return lambda: None

    def are(self, kind):
        """Numbers of the batches whose step ended so."""
        return [number for number, result in self.steps if result == kind]


def both_ways(tmp_path, store, monkeypatch, accidents=None, *, resume=False, **settings):
    """The same run twice, looking at every step and reading later where it may: (folder, error or None, Batches) each.

    Checkpoints are written while the run waits, so that the order of the lines in the log is no matter of chance.
    """
    ends = []
    for waits_on, name in ((("cuda",), "looked at"), (WAITS_ON, "read later")):
        with monkeypatch.context() as patch:
            patch.setattr(Layout, "WAITS_ON", waits_on)
            batches, error = Batches(patch, accidents), None
            folder = tmp_path / name
            try:
                run_here(folder, store, resume=resume, train__save_in_background="false", **settings)
            except MinilmError as caught:
                error = caught
            ends.append((folder / "run", error, batches))
    return ends


def traces(run):
    """All that a run leaves behind, without times and places: lines of the log, files, how it ended."""
    place = str(run.parent)

    def plain(text):
        record = json.loads(text.replace(place, "PLACE"))
        return {name: value for name, value in record.items() if not name.startswith(TIMES)}

    lines = [plain(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [p for part in ("checkpoints", "incidents") for p in (run / part).rglob("*") if p.is_file()]
    files = {
        str(p.relative_to(run)): [plain(line) for line in p.read_text().splitlines()]
        if p.name == "abandoned.jsonl"
        else p.read_bytes()
        for p in kept
    }
    manifest = json.loads((run / "manifest.json").read_text())
    return lines, files, (manifest["state"], manifest["step"])


def assert_the_same(one, other):
    """Two ends of `both_ways`: nothing that a run leaves behind tells them apart."""
    (run, error, _), (twin, twin_error, _) = one, other
    assert type(error) is type(twin_error), (error, twin_error)
    said = [str(e).replace(str(r.parent), "PLACE") for e, r in ((error, run), (twin_error, twin))]
    assert said[0] == said[1]
    (lines, files, end), (twin_lines, twin_files, twin_end) = traces(run), traces(twin)
    assert len(lines) > 5 and files  # something was compared
    for mine, theirs in zip(lines, twin_lines, strict=True):
        assert mine == theirs
    assert files.keys() == twin_files.keys()
    assert [name for name in files if files[name] != twin_files[name]] == []
    assert end == twin_end
