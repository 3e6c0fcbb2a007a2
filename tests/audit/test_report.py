"""The report: a model that uses its far branch is told from one that does not, whatever the numbers around it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from linattn import convert_model
from linattn.audit import (
    RecallTask,
    audit_model,
    by_position,
    cheaper_from,
    compare_cached,
    counterfactual_kl,
    equal_bytes_control,
    far_gain,
    far_off,
    layer_telemetry,
    mean_over,
    recall_by_distance,
    retained_off,
    stacked_reach,
    state_bytes,
    token_losses,
    verdict,
)
from linattn.audit.ablations import converted_layers
from linattn.audit.far_gain import FarGain
from linattn.audit.positions import Bucket
from linattn.audit.render import report_tables, to_markdown
from linattn.convert import ConvertedAttention
from linattn.distill import calibrate
from linattn.errors import ConversionError, OptionError, ShapeError

WINDOW, SINKS, LENGTH = 8, 2, 96
EDGES = (0, 8, 32, 96)


@pytest.fixture
def text(llama):
    """What the teacher itself writes: no other model can predict it better, on average."""
    torch.manual_seed(1)
    first = torch.ones(12, 1, dtype=torch.long)
    return llama().generate(first, do_sample=True, top_k=0, max_new_tokens=LENGTH - 1, min_new_tokens=LENGTH - 1)


@pytest.fixture
def student(llama, text):
    model = convert_model(llama(), window=WINDOW, sinks=SINKS)
    calibrate(model, [text[:4]] * 30)
    return model


def shift_far_bias(model, change):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ConvertedAttention):
                module.far_bias.add_(change)


def test_a_model_that_uses_its_far_branch_is_said_to(llama, text, student):
    report = audit_model(llama(), student, text[4:], edges=EDGES)
    assert report["verdict"][0].startswith("It uses its far branch")
    assert "beats the untrained sliding window" in report["verdict"][1]
    assert report["far_gain"]["ratio"] > 0.9
    assert report["beyond_reach"]["far_branch"]["mean"] > 0.1


def test_a_window_only_model_in_disguise_is_caught(llama, text, student):
    shift_far_bias(student, -60)  # a far branch in name: it runs, and weighs nothing
    report = audit_model(llama(), student, text[4:], edges=EDGES)
    assert report["verdict"][0].startswith("It is a window-only model in disguise")
    assert "loses to the untrained sliding window" in report["verdict"][1]
    assert report["far_gain"]["ratio"] < 0.5  # what windows pass on from layer to layer
    assert report["models"]["student"]["bytes"]["linear"] > 0


def test_windows_that_differ_are_held_against_their_layout_too(llama, text):
    teacher, reports = llama(), []
    model = convert_model(llama(), window=[WINDOW, 2 * WINDOW], sinks=SINKS)
    report = audit_model(
        teacher, model, text[4:], parts=["losses"], edges=EDGES, progress=lambda *done: reports.append(done)
    )
    assert reports == [(done, 7) for done in range(1, 8)]
    with equal_bytes_control(teacher, model, by_layer=True) as control:
        windows = [module.window for module in control.modules() if isinstance(module, ConvertedAttention)]
        losses = token_losses(control, text[4:])
    found = report["models"]["layer_control"]
    assert (found["windows"], found["buckets"]) == (windows, by_position(losses, edges=EDGES).as_dict()["buckets"])
    over = mean_over(losses - token_losses(model, text[4:]), start=2 * WINDOW + SINKS + 1)
    assert report["beyond_reach"]["over_layer_control"] == over.as_dict()
    assert any("its layout without its far branches" in sentence for sentence in report["verdict"])
    assert "| equal bytes, layer by layer |" in to_markdown(report)


def test_retained_tokens_are_near_and_a_part_of_their_own(llama, text):
    model, reports = convert_model(llama(), window=WINDOW, sinks=SINKS, retained=6), []
    report = audit_model(llama(), model, text[4:], edges=EDGES, progress=lambda *done: reports.append(done))
    assert reports[-1][0] == reports[-1][1] == len(reports)
    assert (report["reach"], report["retained"]) == (WINDOW + SINKS + 6, 6)
    losses = token_losses(model, text[4:])
    with retained_off(model):
        without = token_losses(model, text[4:])
    assert report["models"]["retained_off"] == by_position(without, edges=EDGES).as_dict()
    worth = mean_over(without - losses, start=WINDOW + SINKS + 7)
    assert report["beyond_reach"]["retained"] == worth.as_dict()
    with equal_bytes_control(llama(), model, by_layer=True) as control:
        assert report["models"]["layer_control"]["windows"] == [layer.window for layer in converted_layers(control)]
    assert sum(sentence.startswith("Its retained tokens") for sentence in report["verdict"]) == 1
    assert any("beyond window, retained tokens and sinks" in sentence for sentence in report["verdict"])
    markdown = to_markdown(report)
    for row in ("| exact tokens alone − this model |", "| none retained − this model |", "| none retained |"):
        assert row in markdown
    assert "window alone" not in markdown
    assert report["cache"]["student"][0]["difference"] < 1e-2


def test_a_layer_bound_to_more_than_the_text_is_audited_as_softmax(llama, text):
    options = {"window": WINDOW, "sinks": SINKS, "keep_softmax": [0]}
    plain, bound = (convert_model(llama(), **options, softmax_window=window) for window in (None, LENGTH))
    for model in (plain, bound):
        calibrate(model, [text[:4]] * 3)
    parts = ["losses", "far_gain", "counterfactual", "telemetry", "cache"]
    want, got = (audit_model(llama(), model, text[4:], edges=EDGES, parts=parts) for model in (plain, bound))
    assert (got["reach"], got["models"]["control"]["windows"]) == (WINDOW + SINKS, want["models"]["control"]["windows"])
    assert got["models"]["control"]["bytes"]["total"] <= got["models"]["student"]["bytes"]["total"]
    assert got["verdict"][:3] == want["verdict"][:3]
    for report in (got, want):
        del report["verdict"], report["cheaper_from"], report["cache"]
        for facts in report["models"].values():
            facts.pop("bytes", None)
    assert leaves(got) == pytest.approx(leaves(want), rel=1e-3, abs=1e-4, nan_ok=True)


def leaves(value, path=""):
    """The numbers of a report by their place in it."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, each in items for key, leaf in leaves(each, f"{path}/{name}").items()}
    return {path: math.nan if value is None else value} if not isinstance(value, str) else {}


def test_a_far_branch_that_harms_is_said_to(llama, text):
    model = convert_model(llama(), feature_map="elu", window=40, sinks=SINKS)
    shift_far_bias(model, 30)  # all weight on the mean of what is far
    assert audit_model(llama(), model, text[4:], edges=EDGES)["verdict"][0].startswith("Its far branch harms")


def test_it_reports_what_the_parts_measure(llama, text, student):
    teacher, ids, reports = llama(), text[4:], []
    progress = lambda *report: reports.append(report)  # noqa: E731
    report = audit_model(teacher, student, ids, edges=EDGES, trained_control=student, stride=3, progress=progress)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert reports == [(done, 17) for done in range(1, 18)]
    assert "recall" not in report
    assert report["cheaper_from"] == cheaper_from(teacher, student)
    assert report["reach"] == WINDOW + SINKS
    full = token_losses(student, ids)
    with far_off(student):
        window = token_losses(student, ids)
        assert report["models"]["trained_control"] == {
            **by_position(window, edges=EDGES).as_dict(),
            "bytes": state_bytes(student, LENGTH).as_dict(),
            "windows": [WINDOW] * 2,
        }
    assert report["models"]["student"]["buckets"] == by_position(full, edges=EDGES).as_dict()["buckets"]
    assert report["models"]["far_off"] == by_position(window, edges=EDGES).as_dict()
    assert report["beyond_reach"]["far_branch"] == mean_over(window - full, start=WINDOW + SINKS + 1).as_dict()
    assert report["differences"]["far_branch"] == by_position(window - full, edges=EDGES).as_dict()
    assert report["differences"].keys() == report["beyond_reach"].keys()
    with equal_bytes_control(teacher, student) as control:
        over = mean_over(token_losses(control, ids) - full, start=WINDOW + SINKS + 1)
        assert report["models"]["control"]["bytes"] == state_bytes(control, LENGTH).as_dict()
    assert report["beyond_reach"]["over_control"] == over.as_dict()
    gain = far_gain(teacher, student, ids, context=WINDOW + SINKS, start=LENGTH // 2, stride=3)
    assert report["far_gain"]["ratio"] == pytest.approx(gain.ratio)
    assert report["far_gain"]["standard_error"] == pytest.approx(gain.standard_error)


def some_recall(model):
    facts = RecallTask("facts", lambda key, value: [1, 30 + value], lambda key, value: ([1], [30 + value]), values=5)
    return recall_by_distance(model, [facts], torch.arange(3, 9), distances=[6, 30], prompts=4, lead=8)


def test_every_part_is_what_its_function_measures(llama, text, student):
    teacher, ids, reports = llama(), text[4:], []
    report = audit_model(
        teacher,
        student,
        ids,
        parts=["counterfactual", "telemetry", "cache", "recall", "speed"],
        recall=some_recall,
        trained_control=student,
        lengths=[16, 64],
        edges=EDGES,
        progress=lambda *each: reports.append(each),
    )
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert reports == [(done, 12) for done in range(1, 13)]
    assert not {"models", "far_gain"} & report.keys()
    assert (report["length"], report["windows"]) == (LENGTH, 8)

    past, options = report["counterfactual"], {"boundary": LENGTH // 2, "sinks": SINKS}
    assert past["stacked_reach"] == stacked_reach(student)
    with far_off(student):
        windows_alone = counterfactual_kl(student, ids, **options)
    measured = {"teacher": counterfactual_kl(teacher, ids, **options), "far_off": windows_alone}
    measured["student"] = counterfactual_kl(student, ids, **options)
    for name, values in measured.items():
        assert past["models"][name] == {
            **by_position(values, edges=EDGES).as_dict(),
            "beyond_reach": mean_over(values, start=WINDOW + SINKS + 1).as_dict(),
            "beyond_stack": mean_over(values, start=stacked_reach(student)).as_dict(),
        }
    assert past["models"]["far_off"]["beyond_stack"]["mean"] == 0.0
    assert past["models"]["student"]["beyond_stack"]["mean"] > 0.0

    layers = layer_telemetry(teacher, student, ids[:4])
    assert report["telemetry"] == {"layers": json.loads(json.dumps([layer.as_dict() for layer in layers]))}
    for name, model in (("teacher", teacher), ("student", student)):
        assert report["cache"][name] == [check._asdict() for check in compare_cached(model, ids[:1])]
        assert [at["length"] for at in report["speed"][name]] == [16, 64]
        assert [at["bytes"] for at in report["speed"][name]] == [state_bytes(model, n).total for n in (16, 64)]
        assert report["recall"][name] == [found.as_dict() for found in some_recall(model)]
    with equal_bytes_control(teacher, student) as control:
        assert report["recall"]["control"] == [found.as_dict() for found in some_recall(control)]
    with far_off(student):
        assert report["recall"]["trained_control"] == [found.as_dict() for found in some_recall(student)]
    assert [sentence.split()[0] for sentence in report["verdict"]] == [
        *("Its", "Another", "Further", "Of", "With", "Task", "Its")
    ]


def test_a_model_without_a_far_branch_is_audited_as_what_it_is(llama, text):
    model = convert_model(llama(), feature_map=None, window=WINDOW, sinks=SINKS)
    parts = ["losses", "far_gain", "counterfactual", "telemetry", "cache"]
    report = audit_model(llama(), model, text[4:], parts=parts, trained_control=model, edges=EDGES)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    for other in ("far_off", "control", "trained_control"):  # its bytes buy its own window
        assert report["models"][other]["buckets"] == report["models"]["student"]["buckets"]
    assert report["counterfactual"]["models"]["student"]["beyond_stack"]["mean"] == 0.0
    for layer in report["telemetry"]["layers"]:
        assert max(map(abs, layer["far_mass"])) < 1e-9 < 0.1 < min(layer["teacher_far_mass"])
        assert (layer["effective_rank"], layer["greatest_rank"]) == ([None, None], 0)
    assert all(check["agree"] == 1.0 for check in report["cache"]["student"])


def test_the_far_gain_alone_is_the_same(llama, text, student):
    reports, ids = [], text[4:]
    progress = lambda *each: reports.append(each)  # noqa: E731
    report = audit_model(llama(), student, ids, parts=["far_gain"], progress=progress)
    assert report["far_gain"] == far_gain(llama(), student, ids, context=WINDOW + SINKS, start=LENGTH // 2).as_dict()
    assert reports == [(done, 4) for done in range(1, 5)]
    near = audit_model(llama(), student, ids, parts=["far_gain"], context=6)["far_gain"]
    assert near == far_gain(llama(), student, ids, context=6, start=LENGTH // 2).as_dict()
    with pytest.raises(OptionError, match="context = 999 ≤ start"):
        audit_model(llama(), student, ids, parts=["far_gain"], context=999)


@pytest.mark.parametrize("part", ["losses", "recall"])
def test_the_teacher_is_given_back_also_after_an_error(llama, text, student, part):
    teacher = llama()

    def fails(model):
        if model is not student and type(model) is not type(llama()):
            raise KeyError
        return some_recall(model)

    def stop(done, total):
        if part == "losses" and done == 3:
            raise KeyError

    with pytest.raises(KeyError) as caught:
        audit_model(teacher, student, text[4:6, :40], parts=[part], recall=fails, progress=stop)
    assert caught.tb is not None  # which keeps the frames
    assert type(teacher) is type(llama())


def test_the_models_are_left_as_they_were(llama, text, student):
    teacher = llama().train()
    audit_model(teacher, student, text[4:6, :40], edges=EDGES, recall=some_recall)
    assert type(teacher) is type(llama())
    assert teacher.training
    torch.testing.assert_close(dict(teacher.state_dict()), dict(llama().state_dict()), rtol=0, atol=0)


def buckets(**means: tuple[float, float]) -> dict[str, Bucket]:
    rest = {"far_branch": (0.1, 0.01), "window_cost": (0.2, 0.01), "cost": (0.1, 0.01), "over_control": (0.1, 0.01)}
    return {name: Bucket(11, 96, mean, error, 100, 5) for name, (mean, error) in (rest | means).items()}


GAIN = FarGain(Bucket(48, 96, 0.4, 0.1, 100, 5), Bucket(48, 96, 0.1, 0.1, 100, 5), 0.25, 0.05, 10, 2)


@pytest.mark.parametrize(
    ("means", "sentence", "says"),
    [
        ({}, 0, "uses its far branch: without it, cross-entropy rises by 0.1000 ± 0.0100 nats beyond 10 tokens"),
        ({"far_branch": (-0.1, 0.01)}, 0, "far branch harms: without it, cross-entropy falls by 0.1000"),
        ({"far_branch": (0.01, 0.011)}, 0, "window-only model in disguise"),
        ({"far_branch": (-0.01, 0.011)}, 0, "window-only model in disguise"),
        ({"far_branch": (0.04, 0.06)}, 0, "this text cannot tell"),
        ({"far_branch": (0.01, 0.02), "window_cost": (-0.1, 0.1)}, 0, "this text cannot tell"),
        ({"over_control": (0.1, 0.2)}, 1, "ties with the untrained"),
        ({"over_control": (-0.3, 0.2)}, 1, "loses to the untrained"),
        ({"over_trained_control": (-0.3, 0.2)}, 2, "loses to the trained"),
        (
            {"retained": (0.1, 0.01)},
            1,
            "retained tokens help: with them far like their neighbours, cross-entropy rises",
        ),
        (
            {"retained": (-0.1, 0.01)},
            1,
            "retained tokens harm: with them far like their neighbours, cross-entropy falls",
        ),
        ({"retained": (0.1, 0.2)}, 1, "make no difference that counts"),
        ({"retained": (0.1, 0.01), "far_branch": (0.01, 0.011)}, 0, "near-only model in disguise"),
        ({"retained": (0.1, 0.01)}, 0, "where its window and retained tokens alone are 0.2000 ± 0.0100 nats worse"),
        ({"cost": (0.3, 0.2)}, 2, "loses 0.3000 ± 0.2000 nats against its teacher"),
        ({"cost": (0.1, 0.2)}, 2, "loses no measurable"),
        ({"cost": (-0.3, 0.2)}, 2, "gains 0.3000"),
        ({}, 4, "fewer bytes than its teacher's from 77 tokens on"),
        ({}, 3, "From position 48 on, it gains 0.25 ± 0.05 of what its teacher gains"),
    ],
)
def test_verdicts(means, sentence, says):
    assert says in verdict(buckets(**means), GAIN, 77)[sentence]


def test_a_text_without_far_gain_is_said_to_be_one():
    assert "teacher gains nothing" in verdict(buckets(), GAIN._replace(ratio=math.nan), 77)[-2]


def test_a_memory_that_never_pays_is_said_to():
    assert "more bytes than its teacher's at any length" in verdict(buckets(), GAIN, None)[-1]


def test_what_cannot_be_audited_is_refused(llama, windows):
    student = convert_model(llama(), window=8, sinks=2)
    with pytest.raises(ShapeError, match="got 1 windows of 40"):
        audit_model(llama(), student, windows(1))
    with pytest.raises(ShapeError, match="window \\+ sinks = 10"):
        audit_model(llama(), student, windows(2, 11))
    with pytest.raises(OptionError, match="got speeed; expected some of losses, far_gain"):
        audit_model(llama(), student, windows(2), parts=["losses", "speeed"])
    with pytest.raises(OptionError, match="start=9"):
        audit_model(llama(), student, windows(2), start=9)
    with pytest.raises(ConversionError, match="no converted layer"):
        audit_model(llama(), llama(), windows(2))
    with pytest.raises(ConversionError, match="converted already"):
        audit_model(student, student, windows(2))


def test_losses_of_windows_that_the_widest_layer_attends_exactly(llama, windows):
    """The other layer has something far: its absence shows, and what is told beyond the widest is left out."""
    student = convert_model(llama(), window=[8, 3], sinks=2)
    report = audit_model(llama(), student, windows(2, 11), parts=["losses"])
    told = audit_model(llama(), student, windows(2, 11), parts=["losses", "far_gain"], context=3)
    assert told["models"] == report["models"]
    assert told["far_gain"] == far_gain(llama(), student, windows(2, 11), context=3, start=5).as_dict()
    with pytest.raises(ShapeError, match="window \\+ sinks = 10"):
        audit_model(llama(), student, windows(2, 11), parts=["losses", "far_gain"])
    assert report["beyond_reach"] == {}
    assert report["models"]["far_off"]["buckets"] != report["models"]["student"]["buckets"]
    assert report["verdict"] == [
        f"Its memory takes fewer bytes than its teacher's from {report['cheaper_from']} tokens on."
    ]
    assert [table.title for table in report_tables(report)] == ["Cross-entropy by position, nats per token"]
