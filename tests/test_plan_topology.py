"""Planning for TPUs: names of topologies, reports, the search, and (slow, where libtpu is installed) known figures."""

import importlib.util

import jax
import pytest

from llm_jax import cli, configuration, plan
from llm_jax.errors import UserError
from llm_jax.parallel import hlo, topologies
from llm_jax.training import memory, plan_search, planning
from llm_jax.training.setup import setup
from tests.parallel import on_mesh

GIB = 2**30
LLAMA = ("llama2_7b", {"model.vocab_size": 32000})
has_libtpu = importlib.util.find_spec("libtpu") is not None
has_cuda_plugin = importlib.util.find_spec("jax_cuda12_plugin") is not None


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: name)


@pytest.fixture
def on_cpu(monkeypatch):
    """Compiles for this machine instead of a TPU, in this process."""
    monkeypatch.setattr(topologies, "devices", lambda topology: jax.devices()[: topology.chips])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5e", "expected CHIP:AxB"),
        ("v9:2x2", "unknown chip 'v9'; expected one of v4, v5e"),
        ("v5e:2x2x2", "a slice of v5e has 2 axes, as in v5e:4x4"),
        ("v5p:2x2", "a slice of v5p has 3 axes, as in v5p:4x4x4"),
        ("h100:8", "a slice of h100 has HOSTSxGPUS, as in h100:4x4"),
        ("h100:4x8*2", "slices are parts of TPUs; give the number of hosts"),
    ],
)
def test_an_unknown_topology_is_rejected(text, message):
    with pytest.raises(UserError, match=message):
        topologies.parse(text)


def test_names_of_topologies(installed):
    topology = topologies.parse("v5e:4x8*2")
    assert topology == topologies.Topology("v5e", (4, 8), 2) == topologies.parse("v5e:4x8", 2)
    assert topology.name == "v5e:4x8*2" and topology.chips == 64 and topology.platform == "tpu"
    assert topologies.parse("h100:4x8").platform == "gpu"


def test_without_the_cuda_plugin_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"h100:4x8 compiles for a GPU .* pip install 'llm_jax\[plan-gpu\]'"):
        topologies.parse("h100:4x8")


@pytest.mark.skipif(has_libtpu, reason="libtpu is installed")
def test_without_libtpu_a_line_says_what_to_install(command):
    done = command("plan", "--config=llama2_7b", "--topology=v5e:2x2", code=2)
    assert "pip install 'llm_jax[plan]'" in done.stderr and len(done.stderr.splitlines()) == 1
    both = ("--memory", "--topology=v5e:2x2")
    assert "use only one of them" in command("plan", "--config=llama2_7b", *both, code=2).stderr
    assert "--search has no effect" in command("plan", "--memory", "--search", code=2).stderr


@pytest.mark.parametrize(
    ("axes", "speed"),
    [
        ("fsdp", 4.5e11),  # within a host: NVLink
        ("data", 5e10),  # one GPU of each host: one network card
        ("data+fsdp", 4e11),  # all GPUs of four hosts: eight network cards of each host
        ("other", 4e11),
    ],
)
def test_collectives_between_gpus(axes, speed):
    mesh = {"data": 4, "fsdp": 8, "context": 1, "tensor": 1}
    ways = {"fsdp": 8, "data": 4, "data+fsdp": 32}.get(axes)
    seconds = planning.collective_seconds(
        hlo.Collectives("all-gather", axes, 1, 10**9), mesh, topologies.Topology("h100", (4, 8))
    )
    assert seconds == pytest.approx(1e9 * ((ways - 1) / ways if ways else 1) / speed)


def test_a_report_and_its_text(on_cpu):
    config = on_mesh.tiny(**{"model.remat": "full"})
    report = planning.report(config, topologies.Topology("v5e", (1, 1)))
    assert report["memory"]["peak"] > report["memory"]["arguments"] > report["memory"]["optimizer"] > 0
    state, _ = plan_search.state_sizes(config)
    assert plan_search.least_bytes(config, searched(config), state) == state <= report["memory"]["arguments"]
    assert report["collectives"] == [] and report["seconds"]["shortest"] == report["seconds"]["longest"]
    # Recomputing the forward pass adds a third at most; attention counts all pairs here, and all layers.
    assert 1.0 < report["flops"]["compiled"] / report["flops"]["model"] < 1.5
    text = plan_search.describe(report)
    assert "v5e:1x1, 1 devices" in text and "6 N D" in text and "largest arrays" in text


@pytest.mark.slow
def test_a_step_of_decoding(on_cpu):
    report = planning.report(on_mesh.tiny(), topologies.Topology("v5e", (1, 1)), decode=True)
    assert report["decode"] and report["flops"]["compiled"] > 0 and "one new token" in plan_search.describe(report)


@pytest.fixture
def compiler(monkeypatch):
    """Stands in for the compiler: a step needs `ratio` times what its shapes say; the changes that it has compiled."""
    compiled = []

    def plan(config, topology, seconds):
        changes = searched(config)
        compiled.append(changes)
        if config.train.batch_size % (changes["mesh.data"] * changes["mesh.fsdp"] * config.train.grad_accumulation):
            raise UserError(f"train.batch_size={config.train.batch_size} cannot be split")
        needed = compiler.ratio * plan_search.typical_bytes(config, changes, state_sizes(config)[0])
        if seconds < 1:
            raise TimeoutError
        if len(compiled) == compiler.interrupted:
            raise KeyboardInterrupt
        if needed > topology.chip.memory:
            raise planning.DoesNotFit("does not fit", needed)
        return {
            "batch": [config.train.batch_size, 1],
            "seconds": {"longest": float(config.train.batch_size * config.mesh.tensor)},
            "memory": {"peak": needed},
            "utilization": [0.1, 0.2],
        }

    def compiler(ratio, interrupted=0):
        compiler.ratio, compiler.interrupted = ratio, interrupted
        return compiled

    known = {}

    def state_sizes(config, compute=plan_search.state_sizes):
        if config.model.width not in known:  # they do not depend on what a search changes
            known[config.model.width] = compute(config)
        return known[config.model.width]

    compiler.state_sizes = state_sizes
    monkeypatch.setattr(planning, "plan", plan)
    monkeypatch.setattr(plan_search, "state_sizes", state_sizes)
    return compiler


def searched(config):
    """The options that a search changes."""
    axes = {f"mesh.{axis}": getattr(config.mesh, axis) for axis in ("data", "fsdp", "tensor", "context")}
    return axes | {"model.remat": config.model.remat, "train.batch_size": config.train.batch_size}


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.51G of 15.75G hbm. Exceeded by 1.76G.",
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (17.51G) exceeds available HBM (15.75G). HLO module: jit_with_mesh.",
    ],
)
def test_the_messages_of_a_step_that_does_not_fit(message):
    error = planning._compiler_error(message, topologies.Topology("v5e", (4, 4)), 16 * GIB)
    assert isinstance(error, planning.DoesNotFit) and error.needed == 17.51 * GIB
    assert "needs 17.51 of the 16 GiB" in str(error)
    other = planning._compiler_error("INTERNAL: Mosaic failed", topologies.Topology("v5e", (4, 4)), 16 * GIB)
    assert not isinstance(other, planning.DoesNotFit) and "Mosaic failed" in str(other)


def test_the_search_ranks_what_fits(compiler):
    config, topology, lines = configuration.load(*LLAMA), topologies.Topology("v5e", (4, 4)), []
    compiled = compiler(1.2)
    reports = list(plan_search.search(config, topology, 6, lines.append))
    assert len(compiled) == 6 and any("not compiled (--limit=6)" in line for line in lines)
    assert any(line.startswith("6 of 6 (") and " left): mesh.data=1" in line for line in lines)
    best = min(reports, key=plan_search.per_token)
    ranking = plan_search.ranking(reports).splitlines()
    assert f"--config.mesh.tensor={best['changes']['mesh.tensor']}" in ranking[1] and len(ranking) == 1 + len(reports)
    times = [float(line.split()[0]) for line in ranking[1:]]
    assert times == sorted(times)
    # The best estimates are compiled first: without rematerialization nothing is computed twice.
    _, parameters = compiler.state_sizes(config)
    predicted = [
        plan_search.predicted_seconds(config, changes, topology, parameters) / changes["train.batch_size"]
        for changes in compiled
    ]
    assert predicted == sorted(predicted)
    assert all(
        c["train.batch_size"] % (c["mesh.data"] * c["mesh.fsdp"]) == 0 for c in plan_search.candidates(config, topology)
    )


def test_what_did_not_fit_decides_what_is_tried_next(compiler):
    """With a compiler that needs twice the lower bound, at most a few large steps are tried before one that fits."""
    config, topology, lines = configuration.load(*LLAMA), topologies.Topology("v5e", (4, 4)), []
    compiler(2.0)
    assert list(plan_search.search(config, topology, 4, lines.append))
    assert sum("needs" in line for line in lines) == 1


def test_a_search_without_success_names_the_closest(compiler):
    config, lines = configuration.load(*LLAMA), []
    with pytest.raises(
        UserError, match=r"of the 0 compiled combinations fits v5e:1x1; the closest \(.*\) needs at least 7"
    ):
        list(plan_search.search(config, topologies.Topology("v5e", (1, 1)), 6, lines.append))
    topology, compiled = topologies.Topology("v5e", (4, 4)), compiler(50.0)
    with pytest.raises(
        UserError, match=r"of the 3 compiled combinations fits v5e:4x4; the closest \(.*remat=full"
    ) as raised:
        list(plan_search.search(config, topology, 3, lines.append))
    state, _ = compiler.state_sizes(config)
    least = min(50 * plan_search.typical_bytes(config, changes, state) for changes in compiled)
    assert f"needs {least / GIB:.1f} of the 16 GiB" in str(raised.value)


def test_a_search_goes_on_after_a_combination_that_is_refused(compiler):
    topology = topologies.Topology("v5e", (4, 4))
    config = configuration.load(LLAMA[0], {**LLAMA[1], "train.grad_accumulation": 8})
    lines, compiled = [], compiler(0.01)
    reports = list(plan_search.search(config, topology, 40, lines.append))
    refused = [line for line in lines if line.endswith("cannot be split")]
    assert reports and refused and len(reports) + len(refused) == len(compiled)
    assert all(report["batch"][0] % 8 == 0 for report in reports)
    config = configuration.replace(config, {"train.grad_accumulation": 16})
    with pytest.raises(
        UserError, match=r"3 combinations are invalid and none was compiled; mesh.data.*cannot be split"
    ):
        list(plan_search.search(config, topology, 3, lines.append))


def test_a_search_ends_by_its_time_limit(compiler):
    config, topology, lines = configuration.load(*LLAMA), topologies.Topology("v5e", (4, 4)), []
    compiled = compiler(1.0)
    with pytest.raises(UserError, match=r"none of \d+ combinations was compiled within 0 s"):
        list(plan_search.search(config, topology, 3, lines.append, seconds=0.5))
    assert len(compiled) == 1 and any("the time limit of" in line for line in lines)


@pytest.mark.parametrize(("last", "limit", "left"), [(12, 1000.0, "5 min"), (4, 1000.0, "60 s"), (12, 100.0, "40 s")])
def test_the_remaining_time_of_a_search(monkeypatch, last, limit, left):
    """Two combinations took a minute; what remains is compiled at this speed, until the time limit."""
    monkeypatch.setattr(plan_search.time, "monotonic", lambda: 160.0)
    assert plan_search._remaining(100.0, 1, last, limit) == ""
    assert f"about {left} left" in plan_search._remaining(100.0, 3, last, limit)


def test_an_interrupted_search_prints_its_reports(compiler, installed, capsys):
    compiled = compiler(1.0, interrupted=3)
    with pytest.raises(KeyboardInterrupt):
        cli.call(plan.COMMAND, ("--config=llama2_7b", "--topology=v5e:4x4", "--search"))
    lines = capsys.readouterr().out.splitlines()
    assert len(compiled) == 3 and lines[-3].split()[0] == "ns/token" and "--config.mesh.fsdp=" in lines[-1]


def bytes_of_states(cases):
    """(lower bound, bytes of the state on a device) of each configuration, from shapes."""
    pairs = []
    for changes in cases:
        config = on_mesh.tiny(**changes)
        least = plan_search.least_bytes(config, searched(config), plan_search.state_sizes(config)[0])
        pairs.append((least, memory.shard_bytes(setup(config).state)))
    return pairs


def test_the_lower_bound_is_one_for_every_optimizer_dtype_scheme_and_mesh(simulated):
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    adapters = {"lora.rank": 2, "init_from": "unnamed", "quant.head": ""}
    spread = ((".*/(query|key|value|gate|up)|head/kernel", ("fsdp", ("data", "tensor"))), (".*", ()))
    cases = [
        mesh,
        {**mesh, "optim.kind": "adafactor", "train.grad_accumulation": 2},
        {**mesh, "optim.kind": "lion", "model.precision.params": "bfloat16", "optim.ema_decay": 0.9},
        {**mesh, **adapters, "quant.scheme": "int2:16"},
        {**mesh, "mesh.rules": spread, "optim.kind": "sgd"},
    ]
    for least, held in simulated(8)(bytes_of_states, cases):
        assert held / 8 <= least <= held


@pytest.mark.slow
@pytest.mark.skipif(not has_libtpu, reason="libtpu is not installed (pip install 'llm_jax[plan]')")
@pytest.mark.parametrize(
    ("name", "rows", "length", "gathered", "live"),
    [("v5e:16x16", 4, 2048, 24.4, 3.97), ("v5p:4x4x4", 4, 4096, 24.4, 8.64)],
)
def test_a_7b_step_gathers_14_matrices_per_layer(name, rows, length, gathered, live):
    topology = topologies.parse(name)
    changes = {"train.batch_size": rows * topology.chips, "train.seq_len": length}
    report = planning.plan(configuration.load("llama2_7b", changes), topology)
    moved = dict.fromkeys(("all-gather", "all-reduce", "reduce-scatter", "collective-permute"), 0.0)
    for row in report["collectives"]:
        moved[row["kind"]] = moved.get(row["kind"], 0.0) + row["bytes"] / GIB
    assert moved["all-gather"] + moved["collective-permute"] <= gathered
    assert moved["all-reduce"] + moved["reduce-scatter"] <= 12.32
    assert 0 < report["memory"]["live"] / GIB <= live
    assert report["memory"]["peak"] < report["memory"]["capacity"]


@pytest.mark.slow
@pytest.mark.skipif(not has_cuda_plugin, reason="the CUDA plugin is not installed (pip install 'llm_jax[plan-gpu]')")
@pytest.mark.parametrize("chip", topologies.GPUS)
def test_a_step_compiles_for_gpus_with_weights_and_not_activations_gathered(chip):
    changes = {"train.batch_size": 8, "train.seq_len": 512, "model.attention_kernel": "plain", "model.num_layers": 2}
    changes |= {"model.width": 512, "model.mlp_dim": 1024, "model.num_heads": 8, "model.num_kv_heads": 8}
    report = planning.plan(configuration.load("llama2_7b", changes), topologies.parse(f"{chip}:1x8"))
    layer = 4 * 512 * 512 + 3 * 512 * 1024
    moved = {}
    for row in report["collectives"]:
        moved[row["kind"]] = moved.get(row["kind"], 0) + row["bytes"]
    # The weights of both passes in bfloat16, the head in float32, the ids of the rows.
    assert moved["all-gather"] < 1.1 * (2 * 2 * 2 * layer + 4 * 512 * 32000)
    assert report["flops"]["compiled"] / report["flops"]["model"] < 1.5
    assert 0 < report["memory"]["peak"] < report["memory"]["capacity"] == topologies.GPUS[chip].memory
