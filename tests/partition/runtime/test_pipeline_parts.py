"""The parts of a pipeline without processes: its cache, its microbatches, its log, what it asks of torch."""

import pytest
import torch
from torch import nn

from attnres_fx import AttnResError
from attnres_fx.errors import PipelineError
from attnres_fx.partition import runtime
from attnres_fx.partition.checkpoint import load_checkpoint, save_checkpoint
from attnres_fx.partition.runtime.microbatches import MeanLoss, join_outputs, split_batch
from attnres_fx.partition.runtime.source_cache import SourceCache
from attnres_fx.partition.runtime.step_log import StepLog


def test_a_cache_hands_out_values_cut_off_from_their_graph():
    cache = SourceCache()
    made = torch.ones(2, requires_grad=True) * 2
    cache.put(0, "a", made)
    assert not cache.value(0, "a").requires_grad
    assert cache.value(0, "a").data_ptr() == made.data_ptr()


def test_a_cache_sums_gradients_in_order_and_changes_none_of_them():
    cache = SourceCache()
    cache.put(3, "a", torch.zeros(1))
    assert cache.grad(3, "a") is None
    parts = [torch.tensor([x]) for x in (1e8, 1.0, -1e8)]
    for part in parts:
        cache.accumulate_grad(3, "a", part)
    assert cache.grad(3, "a") == (parts[0] + parts[1]) + parts[2]
    assert parts[0] == 1e8


def test_a_cache_keeps_microbatches_apart_and_counts_its_bytes():
    cache = SourceCache()
    for microbatch in (0, 1):
        for name in ("a", "b"):
            cache.put(microbatch, name, torch.full((4,), float(microbatch)))
    cache.accumulate_grad(1, "b", torch.ones(4))
    assert cache.bytes == cache.peak_bytes == 64 and len(cache) == 5
    cache.drop(0, ["a", "unknown"])
    assert cache.bytes == 48 and cache.value(1, "a")[0] == 1
    cache.finish(1)
    assert cache.bytes == 16 and len(cache) == 1
    cache.clear()
    assert (cache.bytes, len(cache), cache.peak_bytes) == (0, 0, 64)


def test_a_cache_refuses_what_would_be_a_wrong_route():
    cache = SourceCache()
    cache.put(0, "a", torch.zeros(2))
    with pytest.raises(PipelineError, match="'a' of microbatch 0 has come to this rank twice"):
        cache.put(0, "a", torch.zeros(2))
    with pytest.raises(PipelineError, match="'b' of microbatch 0 is not on this rank"):
        cache.value(0, "b")
    with pytest.raises(PipelineError, match=r"gradient of value 'a' has shape \(3,\)"):
        cache.accumulate_grad(0, "a", torch.zeros(3))
    cache.finish(0)
    with pytest.raises(PipelineError, match="its microbatch is done"):
        cache.accumulate_grad(0, "a", torch.zeros(2))


def split(*args, target=None, number=2, **kwargs):
    return split_batch(args, kwargs, target, number, ignore_index=-100, device=torch.device("cpu"))


def test_a_batch_is_split_where_it_is_a_batch_and_shared_elsewhere():
    ids, table, scale = torch.arange(8).view(4, 2), torch.ones(1, 3), torch.tensor(2.0)
    parts = split(ids, "text", mask={"x": ids[:, :1]}, table=table, scale=scale, target=ids)
    (first, _), (second, keywords) = parts.arguments
    assert torch.equal(torch.cat([first[0], second[0]]), ids) and second[1] == "text"
    assert torch.equal(keywords["mask"]["x"], ids[2:, :1])
    assert keywords["table"] is table and keywords["scale"] is scale
    assert torch.equal(parts.targets[1], ids[2:])
    assert parts.counts.tolist() == [4, 4]


def test_microbatches_count_the_target_elements_that_are_not_ignored():
    target = torch.tensor([[1, -100], [-100, -100], [2, 3], [4, 5]])
    assert split(target, target=target).counts.tolist() == [1, 4]
    assert split(target, target=torch.ones(4, 3)).counts.tolist() == [6, 6]
    assert split(target).counts.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("rows", "number", "said"), [(6, 4, "6 rows does not divide"), (1, 2, "1 rows does not divide")]
)
def test_a_batch_that_does_not_divide_is_refused(rows, number, said):
    with pytest.raises(PipelineError, match=said):
        split(torch.zeros(rows, 2), number=number)


def test_weighed_losses_add_up_to_the_mean_of_the_whole_batch():
    torch.manual_seed(0)
    logits = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, -100, 2, 3, -100, -100, -100, -100])
    wanted = nn.functional.cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(wanted, logits)
    parts = split(logits.detach(), target=target, number=4)
    loss = MeanLoss(nn.functional.cross_entropy, lambda outputs: outputs[0], replicas=2)
    loss.start(parts, parts.counts.sum())
    for index, rows in enumerate(logits.split(2)):
        loss([rows], index).backward()
    torch.testing.assert_close(loss.value, wanted.detach())
    torch.testing.assert_close(logits.grad, 2 * gradient)


def test_outputs_of_microbatches_are_joined_again():
    rows, scalar, text = join_outputs([[torch.zeros(2, 1), torch.tensor(1.0), "a"] for _ in range(3)])
    assert rows.shape == (6, 1) and scalar.tolist() == [1, 1, 1] and text == "a"


def test_work_after_a_failure_is_left_out_and_the_first_one_told():
    log = StepLog()
    assert log.attempt("0F0", lambda: 3) == 3
    assert log.attempt("0F1", lambda: 1 // 0) is None
    assert log.attempt("0F2", lambda: pytest.fail("was run")) is None
    assert log.failure_text == "0F1: ZeroDivisionError: integer division or modulo by zero"


@pytest.mark.parametrize("version", ["2.12.1+cpu", "2.11.0a0+git1", "1.13"])
def test_an_older_torch_is_refused_by_name(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(PipelineError, match=r"needs torch 2\.13 or newer and found " + version.replace("+", r"\+")):
        runtime.build_pipeline(None, None, loss_fn=None)


@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.14.0.dev20261101", "3.0"])
def test_a_newer_torch_is_taken(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    runtime.check_torch()


def test_without_a_process_group_nothing_is_built():
    with pytest.raises(AttnResError, match="torchrun"):
        runtime.build_pipeline(None, None, loss_fn=None, compile=False)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_an_unsplit_checkpoint_keeps_options_and_state(tmp_path):
    def made(rate):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": rate / 10}]
        return model, torch.optim.Adam(groups, lr=rate)

    model, optimizer = made(0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / "c", model, optimizer)
    other, fresh = made(9.0)
    load_checkpoint(tmp_path / "c", other, fresh)
    assert [g["lr"] for g in fresh.param_groups] == [0.1, 0.01]
    assert fresh.state[other.bias]["step"] == 1
    torch.testing.assert_close(fresh.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    torch.testing.assert_close(other.weight, model.weight)
