"""Models that are cast, copied, pickled, or beside one another in a process."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from oasis_fx import OasisAdamW, oasis_backend
from oasis_fx.runtime.optim.items import find_items
from oasis_fx.runtime.optim.preparation import prepare_state


def trained(kit, steps: int = 2):
    model = kit.Net()
    compiled = kit.compile_eager(model)
    optimizer = OasisAdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        kit.backward(compiled.run, kit.batch(step))
        optimizer.step(), optimizer.zero_grad()
    return model, compiled, optimizer


def test_a_model_cast_after_the_first_step_takes_bases_and_moments_along(kit) -> None:
    model, compiled, optimizer = trained(kit)
    weight = model.blocks[0].up.weight
    before = {key: optimizer.state[weight][key].clone() for key in ("basis", "exp_avg", "exp_avg_sq")}
    model.float()
    kit.backward(compiled.run, kit.batch(2).float())
    torch.testing.assert_close(weight.grad.basis.detach(), before["basis"].float(), rtol=0, atol=0)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[0]["betas"] = (1 - 1e-7, 1 - 1e-7)  # moments hardly move: they must be the old ones
    versions = weight.grad.subspace.version
    prepare_state(optimizer, next(iter(find_items(optimizer))))
    assert weight.grad.subspace.version == versions
    for key, value in before.items():
        torch.testing.assert_close(optimizer.state[weight][key], value.float(), rtol=0, atol=0)
    optimizer.step(), optimizer.zero_grad()
    for dtype in (torch.bfloat16, torch.float64):
        model.to(dtype)
        compiled.run(kit.batch(3).to(dtype)).double().square().sum().backward()
        optimizer.step(), optimizer.zero_grad()
        wide = torch.promote_types(dtype, torch.float32)
        state, bias_state = optimizer.state[weight], optimizer.state[model.blocks[0].up.bias]
        assert state["basis"].dtype == state["exp_avg"].dtype == wide and bias_state["exp_avg"].dtype == dtype
        assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_has_bases_of_its_own_and_leaves_the_original_alone(kit, how) -> None:
    model, compiled, _ = trained(kit)
    kit.backward(compiled.run, kit.batch(5))  # gradients are there
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    subspace = model.blocks[0].up.weight.grad.subspace
    version, statistic = subspace.version, subspace.statistic.clone()
    reference = copy.deepcopy(twin)
    twin.zero_grad(), reference.zero_grad()
    optimizer = OasisAdamW(twin.parameters(), lr=1e-2)
    again = kit.compile_eager(twin)
    kit.backward(again.run, kit.batch(6)), kit.backward(reference, kit.batch(6))
    assert kit.count_low_rank(twin, reference) == 4
    assert twin.blocks[0].up.weight.grad.subspace is not subspace
    optimizer.step()
    assert subspace.version == version and torch.equal(subspace.statistic, statistic)


def test_a_copied_or_pickled_backend_compiles_the_copy(kit) -> None:
    model = kit.Net()
    backend = oasis_backend(rank={"blocks.*": 3}, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    kit.backward(compiled, kit.batch())
    twin = copy.deepcopy(compiled)
    kit.backward(twin, kit.batch())
    assert twin._orig_mod.blocks[0].up.weight.grad.subspace is not model.blocks[0].up.weight.grad.subspace
    again = pickle.loads(pickle.dumps(backend))
    assert again.settings == backend.settings and again.compiled_graphs() == []
    fresh, reference = kit.Net(), kit.Net()
    kit.backward(torch.compile(fresh, backend=again), kit.batch()), kit.backward(reference, kit.batch())
    assert kit.count_low_rank(fresh, reference) == 4


def test_a_state_dict_has_no_names_of_ours(kit) -> None:
    model, *_ = trained(kit)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert set(loaded) == set(kit.Net().state_dict()) and all(type(t) is torch.Tensor for t in loaded.values())


def test_two_models_in_turns_under_one_backend(kit) -> None:
    models = [kit.Net(), kit.Net()]
    with torch.no_grad():
        models[1].blocks[0].up.weight.mul_(-1)
    backend = oasis_backend(rank=3, inner="aot_eager")
    references = copy.deepcopy(models)
    optimizers = [OasisAdamW(model.parameters(), lr=1e-2) for model in models]
    compiled = [torch.compile(model, backend=backend) for model in models]
    for step in range(4):
        for model, run, reference, optimizer in zip(models, compiled, references, optimizers, strict=True):
            reference.load_state_dict(model.state_dict())
            model.zero_grad(), reference.zero_grad()
            kit.backward(run, kit.batch(step)), kit.backward(reference, kit.batch(step))
            assert kit.count_low_rank(model, reference) == 4
            optimizer.step()
    assert len({w.grad.subspace for model in models for w in model.parameters() if w.dim() == 2}) == 8


@pytest.mark.timeout(300)
def test_threads_with_generated_code(kit, in_threads) -> None:
    def work(seed: int) -> None:
        model = kit.Net()
        reference = copy.deepcopy(model)
        compiled = torch.compile(model, backend=oasis_backend(rank=2 + seed))
        kit.backward(compiled, kit.batch(seed)), kit.backward(reference, kit.batch(seed))
        assert kit.count_low_rank(model, reference) == 4

    in_threads(work, 2)


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((8,), float(index), dtype=torch.float64) / 10


@pytest.mark.timeout(120)
def test_forked_data_loaders(kit) -> None:
    model, compiled, optimizer = trained(kit)  # threads and compiled code are there when the loader forks
    reference = copy.deepcopy(model)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=4, num_workers=2, multiprocessing_context="fork")
    for x in loader:
        reference.load_state_dict(model.state_dict())
        model.zero_grad(), reference.zero_grad()
        kit.backward(compiled.run, x), kit.backward(reference, x)
        assert kit.count_low_rank(model, reference) == 4
        optimizer.step()
