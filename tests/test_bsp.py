"""The variants of BSP-SGD: the parameters of one process, replicas without drift, and nothing waits that need not."""

import threading
import time
from concurrent.futures import Future
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from repro.collectives import ALGORITHMS, allreduce, reduce
from repro.collectives.bsp import VARIANTS, Dependency, Overlap, bsp_sgd
from repro.collectives.communicator import Communicator
from repro.collectives.ddp import average, average_hook
from repro.collectives.launch import run_ranks
from repro.errors import ReproError

SLICE, STEPS = 2, 6
LATE = 20  # seconds after which an event that never comes is missed


class Recurrent(nn.Module):
    """Embedding, LSTM and decoder, one matrix for both ends if tied. `first` is registered first, perhaps out of order."""

    def __init__(self, tied=False, first="embedding"):
        super().__init__()
        layers = {"embedding": nn.Embedding(5, 4), "lstm": nn.LSTM(4, 4, num_layers=2), "decoder": nn.Linear(4, 5, not tied)}
        if tied:
            layers["decoder"].weight = layers["embedding"].weight
        self.add_module(first, layers[first])
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, tokens):
        return self.decoder(self.lstm(self.embedding(tokens))[0])


class Shared(nn.Sequential):
    """One layer is called twice."""

    def __init__(self):
        shared = nn.Linear(8, 8)
        super().__init__(nn.Linear(3, 8), nn.Tanh(), shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(8, 5))


class Convolutional(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5, bias=False))


def perceptron():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))


MODELS = {
    "perceptron": perceptron,
    "shared": Shared,
    "convolutional": Convolutional,
    "recurrent": Recurrent,
    "tied": partial(Recurrent, tied=True),
    "tied backwards": partial(Recurrent, tied=True, first="decoder"),
}


class Momentum:
    """Descent with momentum, without the seconds that every process needs to import what torch.optim needs."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.velocities = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self):
        for p, velocity in zip(self.parameters, self.velocities, strict=True):
            velocity.mul_(0.9).add_(p.grad)
            p.sub_(0.1 * velocity)


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
ADAMW = partial(torch.optim.AdamW, lr=0.01)


def made(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name]().double()


def minibatch(name, step, ranks):
    """Inputs and targets; items of the minibatch are the last dimension of recurrent models' inputs, else the first."""
    generator = torch.Generator().manual_seed(step)
    items = ranks * SLICE
    if isinstance(made(name), Recurrent):
        return torch.randint(5, (2, 4, items), generator=generator).unbind()
    return torch.randn(items, 3, generator=generator).double(), torch.randint(5, (items,), generator=generator)


def loss(batch, model):
    x, y = batch
    return nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten())


def own_slice(name, step):
    items = slice(dist.get_rank() * SLICE, (dist.get_rank() + 1) * SLICE)
    across = (..., items) if isinstance(made(name), Recurrent) else items
    return [part[across] for part in minibatch(name, step, dist.get_world_size())]


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def alone(name, make, ranks, steps=STEPS):
    """One process, the whole minibatch."""
    model = made(name)
    optimizer = make(model.parameters())
    for step in range(steps):
        model.zero_grad()
        loss(minibatch(name, step, ranks), model).backward()
        optimizer.step()
    return parameters(model)


def together(name, variant, make, algorithm="ring", **options):
    """Ranks start from different parameters: those of rank 0 count."""
    model = made(name, seed=dist.get_rank())
    with bsp_sgd(variant, model, make, algorithm, **options) as training:
        for step in range(STEPS):
            training.step(partial(loss, own_slice(name, step)))
    return parameters(model)


def call_all(calls):
    """One start of the ranks for all of them."""
    return [function(*arguments, **options) for function, arguments, options in calls]


def answers(ranks, function, cases, **options):
    """For each case the answers of all ranks."""
    calls = [(function, case, options) for case in cases]
    return zip(*run_ranks(call_all, ranks, calls, timeout=30), strict=True)


@pytest.mark.parametrize(
    "ranks, kinds",
    [(3, [(model, Momentum) for model in MODELS]), (2, [("perceptron", SGD), ("tied", SGD), ("recurrent", ADAMW)])],
)
def test_every_variant_trains_as_one_process_and_replicas_are_identical(ranks, kinds):
    """Equation 5, with layers that are recurrent, called twice, or share their parameters."""
    cases = [(model, variant, make) for model, make in kinds for variant in VARIANTS]
    for (model, variant, make), replicas in zip(cases, answers(ranks, together, cases), strict=True):
        expected = alone(model, make, ranks)
        torch.testing.assert_close(replicas[0], expected, rtol=0, atol=1e-10, msg=f"{model} by {variant}")
        assert all(torch.equal(replicas[0], other) for other in replicas[1:]), f"{model} by {variant}"


def without_resync(name):
    return together(name, "allreduce", Momentum, resync=None)


def test_replicas_need_no_resynchronisation():
    """The drift that the paper repairs every 5 iterations does not arise: sums are bit-identical on all ranks."""
    for replicas in answers(3, without_resync, [("perceptron",), ("recurrent",)]):
        assert all(torch.equal(replicas[0], other) for other in replicas[1:])


class Drifting(Momentum):
    """Ranks round differently."""

    @torch.no_grad()
    def step(self):
        super().step()
        for p in self.parameters:
            p.add_(1e-6 * dist.get_rank())


def drift(steps):
    model = made("perceptron")
    with bsp_sgd("allreduce", model, Drifting) as training:
        for step in range(steps):
            training.step(partial(loss, own_slice("perceptron", step)))
    return parameters(model)


def test_allreduce_repairs_replicas_every_five_iterations():
    equal = [torch.equal(*replicas) for replicas in answers(2, drift, [(steps,) for steps in (1, 4, 5, 6, 10)])]
    assert equal == [False, False, True, False, True]


def test_any_algorithm_serves():
    cases = [("perceptron", variant, Momentum, a) for variant in ("overlap", "dependency") for a in (*ALGORITHMS, "library")]
    expected = alone("perceptron", Momentum, 3)
    for case, replicas in zip(cases, answers(3, together, cases, block_bytes=64), strict=True):
        for found in replicas:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10, msg=str(case))


class Held(Dependency):
    """Sums wait: that of layer 4 until that of layer 0 is wanted too, that of layer 2 until layer 0 computes once more."""

    def __init__(self, model, *arguments):
        self.gates, self.events, self.begun = {"4": threading.Event(), "2": threading.Event()}, [], threading.Event()
        super().__init__(model, *arguments)
        model[0].register_forward_pre_hook(self.compute)

    def compute(self, *_):
        self.events.append("forward 0")
        if self.events.count("forward 0") == 2:
            self.gates["2"].set()

    def after_backward(self, part):
        super().after_backward(part)
        if part.name == "0":
            self.gates["4"].set()

    def submit(self, function, *arguments, part, **options):
        if function is allreduce and part.name == "2":
            self.begun.wait(LATE)  # or the communicator, if it is late, finds layers 4 and 2 waiting, and takes 2 first

        def held(*arguments, **options):
            if function is allreduce and part.name == "4":
                self.begun.set()
            if function is allreduce and part.name in self.gates and not self.gates[part.name].wait(LATE):
                raise ReproError(f"the sum of {part.name} was held too long")
            result = function(*arguments, **options)
            self.events += [f"sum {part.name}"] * (function is allreduce)
            return result

        return super().submit(held, *arguments, part=part, **options)


def held():
    with Held(made("perceptron"), Momentum, "linear pipeline") as training:
        for step in range(2):
            training.step(partial(loss, own_slice("perceptron", step)))
    return training.events


def test_the_next_forward_starts_before_the_sums_of_later_layers_have_arrived():
    """By the order of backpropagation the sum of layer 2 would travel before that of layer 0, and be held for ever."""
    for events in run_ranks(held, 2):
        assert events.index("sum 0") < events.index("forward 0", 1) < events.index("sum 2")
        assert sorted(events) == sorted(["forward 0", "sum 0", "sum 2", "sum 4"] * 2)


def spans(variant):
    """Of the third iteration, with the time around it, and its seconds."""
    with bsp_sgd(variant, made("perceptron"), Momentum) as training:
        for step in range(3):
            start = time.perf_counter()
            training.step(partial(loss, own_slice("perceptron", step)))
            end = time.perf_counter()
    return start, training.spans, end, training.seconds


COLLECTIVES = ("broadcast", "reduce", "allreduce", "average", "barrier")
LISTED = """
    wait 0, forward 0, wait 0, forward 2, wait 2, forward 4, loss,
    backward 4, backward 2, wait 2, backward 0, wait 0, wait 0, update
"""


@pytest.fixture(scope="module")
def timelines():
    return dict(zip(VARIANTS, answers(2, spans, [(variant,) for variant in VARIANTS]), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_spans_tell_where_the_time_of_an_iteration_went(timelines, variant):
    """Those of the computing thread lie end to end; those of the communicator do not overlap one another."""
    for start, found, end, seconds in timelines[variant]:
        computing = [span for span in found if span.what not in COLLECTIVES]
        communicating = [span for span in found if span.what in COLLECTIVES]
        assert communicating and len(seconds) == 3
        assert start <= computing[0].start and computing[-1].end <= end
        assert all(before.end == after.start for before, after in pairwise(computing))
        assert all(before.end <= after.start for before, after in pairwise(communicating))
        waited = sum(span.end - span.start for span in computing if span.what == "wait")
        assert 0 < seconds[-1].waited == pytest.approx(waited)
        assert seconds[-1].waited + seconds[-1].computing == pytest.approx(computing[-1].end - computing[0].start)
        assert seconds[-1].communicating == pytest.approx(sum(span.end - span.start for span in communicating))


def test_overlap_follows_the_listing_with_the_reduce_that_it_lacks(timelines):
    """Two waits a layer, and one more at the end; only the root updates."""
    for rank, (_, found, _, _) in enumerate(timelines["overlap"]):
        told = [f"{span.what} {span.where}".strip() for span in found]
        listed = [word.strip() for word in LISTED.split(",")][: None if rank == 0 else -1]
        travelled = ["broadcast 0", "broadcast 2", "broadcast 4", "reduce 4", "reduce 2", "reduce 0"]
        assert told == listed + travelled


class AsListed(Overlap):
    """Algorithm 1 as printed."""

    def submit(self, function, *arguments, part, **options):
        if function is reduce and part is self.parts[0]:
            nothing = Future()
            nothing.set_result(None)
            return nothing
        return super().submit(function, *arguments, part=part, **options)


def as_listed():
    model = made("perceptron")
    with AsListed(model, Momentum, "linear pipeline") as training:
        training.step(partial(loss, own_slice("perceptron", 0)))
    return parameters(model)


def test_the_listing_itself_would_leave_the_first_layer_a_local_gradient():
    first = sum(p.numel() for p in made("perceptron")[0].parameters())
    found, expected = run_ranks(as_listed, 2)[0], alone("perceptron", Momentum, 2, steps=1)
    torch.testing.assert_close(found[first:], expected[first:], rtol=0, atol=1e-10)
    model, (x, y) = made("perceptron"), minibatch("perceptron", 0, 2)
    loss((x[:SLICE], y[:SLICE]), model).backward()
    local = torch.cat([(p - 0.1 * p.grad / 2).flatten() for p in model[0].parameters()])
    torch.testing.assert_close(found[:first], local, rtol=0, atol=1e-10)
    assert (found[:first] - expected[:first]).abs().max() > 1e-3


def refusal(model, train, **options):
    """What a rank is told."""
    try:
        with bsp_sgd("overlap", model, Momentum, **options) as training:
            training.step(train)
    except ReproError as error:
        return str(error)


def refusals():
    two = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.ones(1, 2)
    return [
        refusal(two, lambda model: model(x).sum(), layers=[two[1], two[0]]),
        refusal(two, lambda model: model[0](x).sum()),
        refusal(two, lambda model: model[0](x).sum() + 0 * model[1](x).detach().sum()),
    ]


def test_models_that_would_train_wrongly_are_refused():
    for order, uncalled, unformed in run_ranks(refusals, 2):
        assert "0 is called before 1" in order and "did not call 1" in uncalled and "parameters of 1 got" in unformed


@pytest.mark.parametrize(
    "variant, model, options, told",
    [
        ("ring", nn.Linear(1, 1), {}, "fork-join, allreduce, overlap, dependency, buckets"),
        ("overlap", nn.Sequential(nn.Linear(1, 1)), {"layers": []}, "no layer holds 0.weight, 0.bias"),
        (
            "allreduce",
            nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).double()),
            {},
            "torch.float32 on cpu, torch.float64 on cpu",
        ),
        ("allreduce", nn.Tanh(), {}, "nothing to train"),
        ("allreduce", nn.Linear(1, 1), {}, "init_process_group"),
    ],
)
def test_wrong_arguments_are_told(variant, model, options, told):
    with pytest.raises(ReproError, match=told):
        bsp_sgd(variant, model, Momentum, **options)


def one_rank_fails(variant):
    """What the ranks raise, and the seconds from the failure."""

    def failing(model):
        if dist.get_rank() == 1:
            raise ValueError("no data")
        return loss(own_slice("perceptron", 0), model)

    dist.barrier()
    start = time.perf_counter()
    try:
        with bsp_sgd(variant, made("perceptron"), Momentum) as training:
            training.step(failing)
    except Exception as error:
        return type(error).__name__, str(error), time.perf_counter() - start


def test_an_exception_on_one_rank_is_an_error_on_all_at_once():
    for variant, (waiting, failed) in zip(VARIANTS, answers(2, one_rank_fails, [(v,) for v in VARIANTS]), strict=True):
        assert failed[:2] == ("ValueError", "no data")
        assert waiting[0] == ("RuntimeError" if variant == "buckets" else "CollectiveError"), waiting
        assert "rank 1 is lost" in waiting[1] and waiting[2] < LATE


def ddp_gradients(algorithm):
    """Of three iterations, since DDP divides its buckets anew after the first; with DDP's own exchange if None."""
    model = made("perceptron")
    ddp = DistributedDataParallel(model, bucket_cap_mb=1e-4)
    if algorithm:
        ddp.register_comm_hook(None, average_hook(algorithm))
    found = []
    for step in range(3):
        model.zero_grad()
        loss(own_slice("perceptron", step), ddp).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(found)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ddp_gets_the_gradients_of_its_own_exchange(ranks):
    algorithms = (None, "ring", "linear pipeline")
    own, *others = answers(ranks, ddp_gradients, [(algorithm,) for algorithm in algorithms])
    for algorithm, found in zip(algorithms[1:], others, strict=True):
        torch.testing.assert_close(found[0], own[0], rtol=1e-12, atol=1e-14, msg=algorithm)
        assert all(torch.equal(found[0], other) for other in found[1:])


def in_order(by_priority):
    """The order in which functions run that wait while the first holds the thread."""
    gate, order = threading.Event(), []
    with Communicator(by_priority) as communicator:

        def first(group):
            assert gate.wait(LATE)

        held = communicator.submit(first)
        while communicator._tasks:
            time.sleep(0.001)
        futures = [
            communicator.submit(lambda priority, group: order.append(priority), priority, priority=priority)
            for priority in (2, 0, 1, 0)
        ]
        gate.set()
        assert [future.result() for future in (held, *futures)] == [None] * 5
    return order


def test_functions_run_as_submitted_or_by_priority():
    by_order, by_priority = answers(2, in_order, [(False,), (True,)])
    assert list(by_order) == [[2, 0, 1, 0]] * 2 and list(by_priority) == [[0, 0, 1, 2]] * 2


def come_and_go(times):
    for _ in range(times):
        with Communicator():
            pass
    return times


def test_groups_without_a_message_are_left_only_when_all_have_come():
    """One in a hundred or so failed to connect to a rank that had already left."""
    assert [list(found) for found in answers(2, come_and_go, [(150,)])] == [[150, 150]]


def side_by_side():
    """Collectives of the communicator and of the main thread at once."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mine, theirs = torch.full((1000,), float(rank)), torch.full((1000,), float(rank))
    with Communicator() as communicator:
        for _ in range(50):
            future = communicator.submit(average, mine, "ring")
            allreduce(theirs, "ring").div_(ranks)
            future.result()
            mine += rank
            theirs += rank
    return mine, theirs


def test_the_main_thread_may_use_its_own_group_meanwhile():
    for rank, found in enumerate(run_ranks(side_by_side, 2)):
        expected = torch.full((1000,), 0.5 * 50 + rank)
        assert all(torch.equal(tensor, expected) for tensor in found)


def after_an_error():
    """What the future of a wrong call and what was submitted after it say."""
    with Communicator() as communicator:
        wrong = communicator.submit(allreduce, torch.zeros(2 + dist.get_rank()), "ring", timeout=2.0)
        told = []
        for wait in (wrong.result, lambda: communicator.submit(allreduce, torch.zeros(1), "ring").result()):
            try:
                wait()
            except ReproError as error:
                told.append(str(error))
    return told


def test_an_error_is_that_of_everything_after_it():
    for told in run_ranks(after_an_error, 2):
        assert len(told) == 2 and told[0] == told[1] and "allreduce by ring" in told[0]
