"""Metrics and progress of all tickets in one place, piece by piece."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from modules import Lit, fit, quiet_trainer
from torch.distributed import HashStore
from torchmetrics import MeanMetric

from lightning_earlybird.parallel.courses import Course
from lightning_earlybird.parallel.exchange import Beat, Exchange
from lightning_earlybird.parallel.mail import Inbox, Outbox
from lightning_earlybird.parallel.progress import AllTicketsInBar, Occasionally, TicketProgress, describe_progress
from lightning_earlybird.parallel.relay import MetricRelay, logged_as, named_by_ticket
from lightning_earlybird.parallel.store import StoreClient


def test_metrics_of_a_rank_get_the_names_of_its_tickets():
    assert named_by_ticket({"loss": 1.0, "epoch": 2}, [3]) == {"ticket_3/loss": 1.0, "ticket_3/epoch": 2}
    assert named_by_ticket({"lr": 0.1}, [1, 2]) == {"ticket_1/lr": 0.1, "ticket_2/lr": 0.1}


def test_what_is_known_of_each_ticket_apart_is_not_given_out_as_the_rank_s():
    metrics = {"loss": 1.5, "ticket_1/loss": 1.0, "ticket_2/loss": 2.0, "score": 3.0, "tickets_1_2/score": 3.0}
    expected = {"ticket_1/loss": 1.0, "ticket_2/loss": 2.0, "tickets_1_2/score": 3.0}
    assert named_by_ticket(metrics, [1, 2]) == expected


def test_what_is_known_of_regions_and_of_all_tickets_keeps_its_name():
    metrics = {"earlybird/region_loss/0-300": 1.0, "earlybird/cost_of_dense": 0.5}
    assert named_by_ticket(metrics, [0, 1]) == metrics


def test_names_that_only_look_like_a_ticket_s_are_the_rank_s_own():
    assert named_by_ticket({"ticket_price": 1.0, "my_ticket_1/x": 2.0}, [0]) == {
        "ticket_0/ticket_price": 1.0,
        "ticket_0/my_ticket_1/x": 2.0,
    }


class Logger(CSVLogger):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.rows: list[tuple[dict[str, Any], int | None]] = []
        self.saves = 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((dict(metrics), step))

    def save(self) -> None:
        self.saves += 1


def test_rank_0_logs_its_own_and_what_others_have_sent_each_to_the_same_logger(tmp_path):
    here, there = [Logger(tmp_path), Logger(tmp_path)], [Logger(tmp_path), Logger(tmp_path)]
    sent: list[dict[str, Any]] = []
    first, second = MetricRelay(here, [0], 0, sent.append), MetricRelay(there, [1, 2], 1, sent.append)
    first.attach()
    second.attach()
    here[0].log_metrics({"loss": torch.tensor(1.0)}, step=4)
    there[1].log_metrics({"loss": torch.tensor(2.0)}, step=7)
    assert sent == [{"logger": 1, "metrics": {"ticket_1/loss": 2.0, "ticket_2/loss": 2.0}, "step": 7}]
    first.deliver([(1, message) for message in sent])
    assert here[0].rows == [({"ticket_0/loss": torch.tensor(1.0)}, 4)]
    assert here[1].rows == [({"ticket_1/loss": 2.0, "ticket_2/loss": 2.0}, 7)]
    assert there[1].rows == []
    for relay, loggers in ((first, here), (second, there)):
        relay.detach()
        loggers[0].log_metrics({"loss": 5.0}, step=9)
        assert loggers[0].rows[-1] == ({"loss": 5.0}, 9)


def test_a_rank_that_does_not_speak_for_its_group_logs_as_ever(tmp_path):
    logger = Logger(tmp_path)
    MetricRelay([logger], [1], 3, None).attach()
    logger.log_metrics({"loss": 1.0}, 0)
    assert logger.rows == [({"loss": 1.0}, 0)]


def test_nothing_is_saved_where_nothing_has_arrived(tmp_path):
    logger = Logger(tmp_path)
    MetricRelay([logger], [0], 0, None).deliver([])
    assert logger.saves == 0


def test_a_logger_that_fails_on_what_others_have_sent_is_warned_about_once(tmp_path):
    class Broken(Logger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            raise ConnectionError("the service is gone")

    loggers = [Broken(tmp_path), Logger(tmp_path)]
    message = {"metrics": {"ticket_1/loss": 2.0}, "step": 7}
    relay = MetricRelay(loggers, [0], 0, None)
    with pytest.warns(UserWarning, match=r"Broken failed to log .* \(ConnectionError: the service is gone\)") as warned:
        relay.deliver([(1, {"logger": number, **message}) for number in (0, 1, 0)])
    assert len(warned) == 1 and loggers[1].rows == [({"ticket_1/loss": 2.0}, 7)]


class InTurns(Lit):
    """Logs as in the turns of the tickets 1 and 2."""

    def __init__(self) -> None:
        super().__init__()
        self.metric = MeanMetric()

    def training_step(self, batch, batch_idx):
        for ticket in (1, 2):
            with logged_as(self, ticket, [1, 2]):
                self.log("value", float(ticket), on_step=False, on_epoch=True)
                self.log_dict({"both": 10.0 * ticket}, on_step=True, on_epoch=False)
                self.metric(float(ticket))
                self.log("metric", self.metric, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


def test_in_turns_each_ticket_has_its_own_value_and_the_rank_the_mean():
    trainer = fit(InTurns(), max_epochs=1)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["value"] == 1.5
    assert (metrics["ticket_1/value"], metrics["ticket_2/value"]) == (1.0, 2.0)
    assert (metrics["ticket_1/both"], metrics["ticket_2/both"]) == (10.0, 20.0)


def test_a_metric_object_of_several_tickets_is_said_to_be_of_them_all():
    metrics = fit(InTurns(), max_epochs=1).callback_metrics
    assert float(metrics["metric"]) == float(metrics["tickets_1_2/metric"]) == 1.5
    assert "ticket_1/metric" not in metrics


def status(**changes: Any) -> dict[str, Any]:
    return {"step": 4, "steps": 10, "steps_per_second": 2.0, "remaining_s": 3.0, "loss": 0.5, "ended": False} | changes


def test_one_line_tells_of_all_tickets():
    told = {1: {"2": status(ended=True)}, 0: {"0": status(), "1": status(steps=None, remaining_s=None, loss=None)}}
    assert describe_progress(told) == "0: 40% loss 0.5 2/s 0:00:03 left | 1: step 4 2/s | 2: done"
    assert describe_progress({}) == ""


needs_rich = pytest.mark.skipif(not find_spec("rich"), reason="rich is not installed")


@pytest.mark.parametrize("bar", [TQDMProgressBar, pytest.param(RichProgressBar, marks=needs_rich)])
def test_the_progress_bar_shows_all_tickets(bar):
    trainer = quiet_trainer(bar(), enable_progress_bar=True)
    module = Lit()
    module.trainer = trainer
    texts = ["", "0: 40% | 1: done"]
    added = AllTicketsInBar(trainer, lambda: texts[-1])
    assert trainer.progress_bar_callback.get_metrics(trainer, module)["tickets"] == texts[1]
    texts.pop()
    assert "tickets" not in trainer.progress_bar_callback.get_metrics(trainer, module)
    texts.append("again")
    added.undo()
    assert "tickets" not in trainer.progress_bar_callback.get_metrics(trainer, module)


def test_no_progress_bar_is_no_problem():
    AllTicketsInBar(quiet_trainer(), lambda: "text").undo()


def test_progress_is_told_once_a_second_and_at_the_end_before_anything_else(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lightning_earlybird.parallel.progress.time.monotonic", lambda: now[0])
    told: list[dict[str, Any]] = []
    ended: list[int] = []
    progress = TicketProgress(
        dict.fromkeys((0, 1), Course(0, 0, None)), {0: 8, 1: None},
        lambda: {0: torch.tensor(0.5), 1: {"loss": torch.tensor(0.25)}}, told.append,
        lambda: ended.append(len(told)),
    )  # fmt: skip

    class Clock(type(progress)):  # a second passes with every second batch
        def __init__(self) -> None:
            self.__dict__.update(progress.__dict__)

        def on_train_batch_end(self, *args: Any) -> None:
            now[0] += 0.5
            super().on_train_batch_end(*args)

    fit(Lit(), Clock(), max_steps=5)  # the clock starts with the end of the first batch
    first = {"steps_per_second": 2.0, "ended": False}
    assert told[0] == {
        "0": {"step": 3, "steps": 8, "remaining_s": 2.5, "loss": 0.5} | first,
        "1": {"step": 3, "steps": None, "remaining_s": None, "loss": 0.25} | first,
    }
    assert len(told) == 3 and ended == [2]
    assert told[-1]["0"] == {"step": 5, "steps": 5, "ended": True}


def test_words_become_rarer(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lightning_earlybird.parallel.progress.time.monotonic", lambda: now[0])
    said: list[float] = []
    show = Occasionally(lambda: said.append(now[0]))
    for second in range(3600):
        now[0] = float(second)
        show()
    pauses = [after - before for before, after in zip([0.0, *said], said, strict=False)]
    assert pauses[0] == 10 and pauses == sorted(pauses) and pauses[-1] == 300


def test_who_waits_for_an_event_has_all_that_was_posted_before_it():
    store = HashStore()
    first, second = (Exchange(StoreClient(store), rank, 2, "test") for rank in range(2))
    inbox, outbox, beats = Inbox(), Outbox(), [Beat(), Beat()]
    first.join()
    second.join()
    for number in range(30):
        outbox.put({"number": number, "text": 200_000 * "x"})
    beats[0].marks = beats[1].marks = ["finished"]
    rounds, received = 0, []
    while first.bulletin.missing.get("finished") != 0:
        second.send(beats[1], outbox)
        first.send(beats[0], Outbox())
        first.read(inbox)
        received += [message["number"] for _, message in inbox.take()]
        rounds += 1
    assert received == list(range(30))
    assert rounds > 1
