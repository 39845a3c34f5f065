"""Every private name of torch that oasis_fx relies on, and nothing else of ours imports one.

Read on torch 2.11, 2.13 and 2.14. A name that moved raises ImportError here, at the first use of the backend;
`oasis_fx.backend` turns that into plain Inductor with one warning.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager, boxed_nop
from torch._dynamo.exc import RestartAnalysis, SkipFrame, Unsupported
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    SavedForBackwardsAOTOutput,
    TangentAOTInput,
)
from torch._functorch.compile_utils import fx_graph_cse
from torch._guards import TracingContext
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "RESTARTS",
    "CustomPartitionerFn",
    "FakeTensor",
    "FakeTensorMode",
    "FsdpParameter",
    "SavedForBackwardsAOTOutput",
    "active_ddp",
    "aot_eager_lowering",
    "as_shard",
    "at_end_of_backward",
    "caches_may_be_left_out",
    "changed_inputs",
    "compile_caches_disabled",
    "copy_dynamo_attributes",
    "copy_input_sources",
    "fsdp_parameters",
    "functorch_config",
    "fx_graph_cse",
    "gradient_positions",
    "inductor_lowering",
    "input_placeholders",
    "input_source",
    "is_aot_compile",
    "is_backward_write",
    "is_partial_graph",
    "is_tangent",
    "is_traceable_wrapper_subclass",
    "is_whole_joint",
    "is_write",
    "known_fake",
    "leave_out_of_caches",
    "mark_static_input",
    "output_descriptors",
    "set_output_descriptors",
    "shares_memory",
    "traced_in_backward",
    "tracing_fake_mode",
    "unguarded_fake_mode",
]


# How a backend tells Dynamo to trace anew, or to leave a frame alone: no failures.
RESTARTS = (RestartAnalysis, SkipFrame, Unsupported)


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call a function when the backward pass that runs now is over, as FSDP does."""
    torch.autograd.Variable._execution_engine.queue_callback(function)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class FsdpParameter:
    """A parameter under FSDP2: the one that its optimizer has, and the gathered one that graphs see."""

    sharded: torch.nn.Parameter
    whole: torch.nn.Parameter
    _of_fsdp: Any
    _group_of_fsdp: Any

    @property
    def num_mesh_dims(self) -> int:
        return int(self.sharded.device_mesh.ndim)  # type: ignore[attr-defined]

    @property
    def shard_dim(self) -> int:
        return int(self._of_fsdp.fsdp_placement.dim)

    @property
    def group(self) -> torch.distributed.ProcessGroup | None:
        """Over which it is sharded; None where every rank has all of it."""
        return getattr(self._of_fsdp.mesh_info, "shard_process_group", None)

    @property
    def replicas(self) -> torch.distributed.ProcessGroup | None:
        """Those that have the same shard, under hybrid sharding."""
        return getattr(self._of_fsdp.mesh_info, "replicate_process_group", None)

    @property
    def all_ranks(self) -> list[int]:
        """Those that have a shard of it, replicas included."""
        return self.sharded.device_mesh.mesh.flatten().tolist()  # type: ignore[attr-defined, no-any-return]

    @property
    def gradient_divide_factor(self) -> float | None:
        """By `set_gradient_divide_factor`; None: the number of ranks."""
        return self._group_of_fsdp.gradient_divide_factor  # type: ignore[no-any-return]

    def is_synchronizing(self) -> bool:
        """By `set_requires_gradient_sync` and `set_requires_all_reduce`."""
        whole = self.replicas is None or self._group_of_fsdp.all_reduce_grads
        return bool(self._group_of_fsdp.reduce_grads and whole)


def fsdp_parameters(model: torch.nn.Module) -> list[FsdpParameter]:
    """Of all that `fully_shard` was applied to; gathers each once, since FSDP2 makes gathered parameters then."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    found = []
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # from torch 2.13 on a list
        module.unshard()
        for group in [group for group in groups if group is not None]:
            for parameter in group.fsdp_params:
                if not parameter.is_dtensor:  # of tensor parallelism
                    found.append(FsdpParameter(parameter.sharded_param, parameter._unsharded_param, parameter, group))
        module.reshard()
    return found


def as_shard(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A DTensor around ``values``, which may be of a subclass, laid out as ``like`` is."""
    from torch.distributed.tensor import DTensor

    return DTensor(values, like._spec, requires_grad=False)  # type: ignore[attr-defined, no-any-return]


def active_ddp() -> Any:
    """The `DistributedDataParallel` whose forward pass runs now, or None."""
    return torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()


_STATIC_INPUT = {"_dynamo_static_input_type": "unguarded"}


def aot_eager_lowering(
    gm: fx.GraphModule, example_inputs: Sequence[Any], partition_fn: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Torch's ``aot_eager`` backend, which runs the two graphs node by node, with another partitioner."""
    if partition_fn is None:
        return aot_eager(gm, list(example_inputs))  # type: ignore[no-any-return]
    lowering = aot_autograd(
        fw_compiler=boxed_nop,
        bw_compiler=boxed_nop,
        partition_fn=partition_fn,
        keep_inference_input_mutations=True,
    )
    return lowering(gm, list(example_inputs))  # type: ignore[no-any-return]


def inductor_lowering(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config_patches: dict[str, Any],
    inner_compile: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Inductor, all of it: AOTAutograd, its caches, joint passes, code generation (or ``inner_compile``)."""
    extra: dict[str, Any] = {} if inner_compile is None else {"inner_compile": inner_compile}
    return compile_fx(gm, list(example_inputs), config_patches=config_patches or None, **extra)  # type: ignore[return-value]


def input_source(placeholder: fx.Node) -> str | None:
    """Dynamo's source text of a graph input, such as ``L['self']._modules['fc']._parameters['weight']``."""
    source = getattr(placeholder, "_dynamo_source", None)
    return None if source is None else str(source.name)


def tracing_fake_mode() -> FakeTensorMode | None:
    """The fake mode in which Dynamo traced the graph that is being compiled."""
    context = TracingContext.try_get()
    return None if context is None else context.fake_mode


def known_fake(given: Any) -> Any:
    """The fake value that the compile in progress has made of an input; other inputs (sizes) as they are."""
    mode = tracing_fake_mode()
    if mode is None or not isinstance(given, torch.Tensor) or isinstance(given, FakeTensor):
        return given
    return mode.from_tensor(given)  # remembered by the mode, with the symbolic sizes that Dynamo gave it


def is_aot_compile() -> bool:
    """Whether the compile in progress is of `torch.compile(...).aot_compile`, which saves code without its backend."""
    return bool(getattr(functorch_config, "bypass_autograd_cache_key", False))


def is_partial_graph(gm: fx.GraphModule) -> bool:
    """True where Dynamo broke the user's function: this graph does not see the whole model."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        return True
    # What follows a graph break is compiled as a function of its own, named by Dynamo.
    stack = list(getattr(reason, "user_stack", ()) or ())
    return any("torch_dynamo_resume_in" in frame.name for frame in stack)


def copy_dynamo_attributes(source: fx.GraphModule, target: fx.GraphModule) -> None:
    """Carry over what AOTAutograd and the AOT cache read off a graph of Dynamo's."""
    target.meta = dict(source.meta)
    # Not `_backend_id`: under it, `caching_precompile` keeps the artifact of AOTAutograd and, in a warm process, calls
    # that in place of what a backend returned. It would get no bases. Without an artifact the graph is compiled again.
    for name in ("_param_name_to_source", "_source_to_user_stacks"):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
    copy_input_sources(source.graph, target.graph)


def copy_input_sources(source: fx.Graph, target: fx.Graph) -> None:
    """Carry over what Dynamo notes of where each input of a graph comes from."""
    for old, new in zip(source.find_nodes(op="placeholder"), target.find_nodes(op="placeholder"), strict=False):
        # AOTAutograd asserts that each placeholder has the attribute; None is a legal value.
        new._dynamo_source = getattr(old, "_dynamo_source", None)  # type: ignore[attr-defined]


def shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors (fake ones, too) lie in one storage."""
    try:
        return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a sparse tensor, or one within a transform such as vmap, has none
        return False


def mark_static_input(placeholder: fx.Node) -> None:
    """Make ``placeholder`` an input of ours: it has no source in the user's code, and its memory never moves."""
    placeholder._dynamo_source = None  # type: ignore[attr-defined]
    placeholder.meta["tensor_dict"] = dict(_STATIC_INPUT)


def is_whole_joint(joint: fx.Graph) -> bool:
    """True for the joint graph of a compile, whose inputs and outputs are described; False for a body within one."""
    return "desc" in joint.output_node().meta


def gradient_positions(joint: fx.Graph) -> dict[int, int]:
    """Map the position of each graph input to the position of its gradient in the joint graph's outputs."""
    output = joint.output_node()
    descriptors: Sequence[Any] = output.meta["desc"]
    positions: dict[int, int] = {}
    for position, descriptor in enumerate(descriptors):
        if isinstance(descriptor, GradAOTOutput) and isinstance(descriptor.grad_of, PlainAOTInput):
            positions[descriptor.grad_of.idx] = position
    return positions


def input_placeholders(joint: fx.Graph) -> dict[int, fx.Node]:
    """Map the position of each graph input to its placeholder.

    A tensor subclass among the inputs (a quantised weight) stands in the joint graph as its inner tensors, so the
    n-th input need not be the n-th placeholder; the subclass itself has none.
    """
    described = ((node.meta.get("desc"), node) for node in joint.find_nodes(op="placeholder"))
    return {desc.idx: node for desc, node in described if isinstance(desc, PlainAOTInput)}


def output_descriptors(output: fx.Node) -> list[Any]:
    """What AOTAutograd notes of each output of a graph, in their order; nothing where it has lost it."""
    return list(output.meta.get("desc", ()))


def set_output_descriptors(output: fx.Node, descriptors: Sequence[Any]) -> None:
    """Note what each output of a graph is."""
    output.meta["desc"] = list(descriptors)


def is_tangent(placeholder: fx.Node) -> bool:
    """True for an incoming gradient of the joint graph."""
    return isinstance(placeholder.meta.get("desc"), TangentAOTInput)


def traced_in_backward(joint: fx.Graph) -> set[fx.Node]:
    """Nodes of a joint graph that torch traced while the backward pass ran.

    It tags the nodes of the forward pass, which come first.
    """
    nodes = list(joint.nodes)
    tagged = [i for i, node in enumerate(nodes) if node.meta.get("partitioner_tag") in _OF_FORWARD]
    return set(nodes[tagged[-1] + 1 :]) if tagged else set()


def is_backward_write(node: fx.Node) -> bool:
    """True for an operator at the end of a joint graph that belongs to the backward pass and changes an input."""
    return is_write(node) and node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


def is_write(node: fx.Node) -> bool:
    """Whether a node changes memory that was there before, as ``copy_`` does at the end of a joint graph."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def changed_inputs(joint: fx.Graph) -> dict[fx.Node, bool]:
    """Placeholders whose memory a joint graph changes, and whether it does so in the forward pass.

    Torch says so in two ways: by an operator at the end of the graph that writes to the placeholder, or, where autograd
    has to know of the change, by a forward output that the runtime copies to the input.
    """
    found: dict[fx.Node, bool] = {}
    for node in joint.nodes:
        written = node.args[0] if is_write(node) and node.target is not _SET else None
        if isinstance(written, fx.Node) and written.op == "placeholder":
            found[written] = found.get(written, False) or not is_backward_write(node)
    returned = [_undivided(descriptor) for descriptor in joint.output_node().meta.get("desc", ())]
    copied = {_undivided(output.mutated_input) for output in returned if isinstance(output, InputMutationAOTOutput)}
    for node in joint.find_nodes(op="placeholder"):
        if _undivided(node.meta.get("desc")) in copied and isinstance(node.meta["val"], torch.Tensor):
            found[node] = True
    return found


_OF_FORWARD = ("is_forward", "must_be_in_forward")
_SET = torch.ops.aten.set_.source_Tensor  # gives an input other memory, and leaves what it had


def _undivided(descriptor: Any) -> Any:
    """The descriptor of a tensor subclass for those of its inner tensors."""
    while (base := getattr(descriptor, "base", None)) is not None:
        descriptor = base
    return descriptor


@contextlib.contextmanager
def unguarded_fake_mode(values: Iterable[Any]) -> Iterator[None]:
    """Enter the fake mode of the first fake tensor in ``values``; shape guards met within are not kept."""
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    if mode is None:
        yield
        return
    quiet = mode.shape_env.suppress_guards() if mode.shape_env is not None else contextlib.nullcontext()
    with quiet, mode:
        yield


@contextlib.contextmanager
def caches_may_be_left_out() -> Iterator[None]:
    """Within: `leave_out_of_caches` may be called."""
    with torch._inductor.config.patch(force_disable_caches=torch._inductor.config.force_disable_caches):
        yield


def leave_out_of_caches() -> None:
    """Save no result of the compile in progress: another process would take it without the warning that was given."""
    torch._inductor.config.force_disable_caches = True


@contextlib.contextmanager
def compile_caches_disabled() -> Iterator[None]:
    """Within: AOTAutograd traces again although its cache may hold the result."""
    with (
        functorch_config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        yield
