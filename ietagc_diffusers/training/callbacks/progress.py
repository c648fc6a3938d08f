"""The bar."""

from tqdm.auto import tqdm

from ..ensemble import Callback


class Progress(Callback):
    """A bar over the steps of all proxies. ``visible``: one process per machine shows it."""

    def __init__(self, visible: bool = True):
        self.visible = visible

    def on_start(self, run):
        total, done = run.rounds.total_steps, run.global_step
        self.bar = tqdm(total=total, initial=done, desc="Steps", disable=not self.visible)

    def on_step(self, run, proxy, before):
        self.bar.update(run.global_step - before)

    def on_round(self, run, row, before):
        self.bar.update(run.global_step - before)

    def on_stop(self, run):
        self.bar.close()

    def on_end(self, run):
        self.bar.close()

    def show(self, text: str) -> None:
        """Text behind the bar."""
        self.bar.set_postfix_str(text)
