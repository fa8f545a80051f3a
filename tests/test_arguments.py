"""Command lines and YAML files: what wins, and what is refused with which hint."""

import re

import pytest

from arguments import parse_config
from sgm.config import LoraChoice, SamplingArgs, TrainingArgs
from sgm.errors import UserError

BASE = "args:\n  batch_size: 2\n  fp16: true\n  load: weights\nmodel:\n  scale_factor: 1.0\n"


@pytest.fixture
def parse(tmp_path):
    def parse(text: str, *flags: str, command=SamplingArgs):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return parse_config(command, "test", ["--base", str(path), *flags])

    return parse


def test_files_are_merged_in_order_and_flags_win(tmp_path):
    (tmp_path / "a.yaml").write_text(BASE)
    (tmp_path / "b.yaml").write_text("args: {batch_size: 3, seed: 7}\nmodel: {scale_factor: 2.0}\n")
    files = [str(tmp_path / name) for name in ("a.yaml", "b.yaml")]
    config = parse_config(SamplingArgs, "test", ["--base", *files, "--seed", "9"])
    assert (config.args.batch_size, config.args.seed, config.args.load) == (3, 9, "weights")
    assert config.model == {"scale_factor": 2.0}
    assert config.files == files


@pytest.mark.parametrize("flag", ["--output-dir", "--output_dir"])
def test_flags_are_spelt_either_way(parse, flag):
    assert parse(BASE, flag, "else_where").args.output_dir == "else_where"
    assert parse(BASE, f"{flag}=else_where").args.output_dir == "else_where"


def test_what_deepspeeds_launcher_puts_first_is_taken(tmp_path):
    (tmp_path / "a.yaml").write_text("args: {}")
    base = ["--base", str(tmp_path / "a.yaml")]
    assert parse_config(TrainingArgs, "test", ["--local_rank=3", *base]).args.local_rank == 3


@pytest.mark.parametrize("command", [SamplingArgs, TrainingArgs])
def test_help_lists_every_flag_in_one_spelling(command, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(command, "test", ["--help"])
    listed = capsys.readouterr().out
    assert stop.value.code == 0
    assert re.findall(r"--\w+_\S*", listed) == []
    for option in command.model_fields:
        assert f"--{option.replace('_', '-')}" in listed


def test_a_precision_flag_replaces_the_files_precision(parse):
    args = parse(BASE, "--bf16").args
    assert args.bf16 and not args.fp16
    assert not parse(BASE, "--no-fp16").args.fp16


def test_both_precisions_are_refused(parse):
    with pytest.raises(UserError, match="keep only one"):
        parse("args: {fp16: true, bf16: true}")


def test_each_command_accepts_files_written_for_the_other(parse):
    text = "args: {train_iters: 5, sampling_fps: 8, force_inference: true, mode: finetune}"
    assert parse(text).args.sampling_fps == 8
    assert parse(text, command=TrainingArgs).args.train_iters == 5


def test_the_bounds_of_flags_are_those_of_the_files(parse):
    with pytest.raises(UserError, match="^--batch-size: 0 must be a whole number of at least 1$"):
        parse(BASE, "--batch-size", "0")


def test_a_single_value_is_a_list_of_one(parse):
    assert parse("args: {train_data: clips}", command=TrainingArgs).args.train_data == ["clips"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("args: {bath_size: 2}", "unknown key 'bath_size'.*did you mean 'batch_size'"),
        ("arg: {}", "unknown key 'arg'.*did you mean 'args'"),
        ("args: {batch_size: two}", "batch_size: 'two' must be a whole number"),
        ("args: {batch_size: true}", "batch_size: True must be a whole number"),
        ("args: {fp16: 1}", "fp16: 1 must be true or false"),
        ("args: {input_type: csv}", "'csv' must be 'txt' or 'cli'"),
        ("args: {sampling_image_size: [a, b]}", "size: 'a' must be a whole number$"),
        ("args: {a: [}", "not valid YAML"),
        ("- args", "found a list, but expected keys"),
        ("args: 3", "args must contain keys"),
        ("args: {load: '${nothing}'}", "nothing"),
        ("args: {model_parallel_size: 2}", "must be 1"),
        ("args: {batch_size: 0}", "batch_size: 0 must be a whole number of at least 1"),
        ("args: {sampling_fps: 0}", "at least 1"),
        ("args: {step_cache: -0.1}", "step_cache: -0.1 must be a number of at least 0"),
        ("args: {step_cache: .nan}", "step_cache: nan must be a finite number"),
        (
            "args: {step_cache: 0.1, parallel: video}",
            "step_cache does not work with parallel: video",
        ),
        ("args: {seed: !!int abc}", "not valid YAML"),
        ("args: &a [*a]", "not valid YAML"),
        ("args: {load: '${oc.env:HOME}'}", "because YAML files may not read environment variables"),
        ("args: {load: '~/${ oc.env :HOME,x}'}", "YAML files may not read environment"),
        ("model: {a: [{b: '${args.${oc.env:HOME}}'}]}", "YAML files may not read environment"),
        ("model: {n: oc.env, a: '${${model.n}:HOME}'}", "YAML files may not read environment"),
    ],
)
def test_mistakes_in_yaml_are_named_with_the_nearest_valid_name(parse, text, words):
    with pytest.raises(UserError, match=words) as failure:
        parse(text)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("args: [1]", "second.yaml: found a list at args, but expected keys"),
        ("model: {a: {b: [1]}}", "second.yaml: found a list at model.a.b, but expected keys"),
        ("args: {lora: {x: 1}}", "second.yaml: found keys at args.lora, but expected a list"),
    ],
)
def test_a_list_that_meets_keys_of_another_file_is_named(tmp_path, text, words):
    files = {"first.yaml": "args: {lora: [a]}\nmodel: {a: {b: {c: 1}}}", "second.yaml": text}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        parse_config(SamplingArgs, "test", ["--base", *(str(tmp_path / name) for name in files)])


def test_a_blank_value_means_the_default(parse):
    args = parse("args:\n  negative_prompt:\n  seed: null\n  sampling_image_size:\n  load:\n").args
    assert (args.negative_prompt, args.seed, args.load) == ("", 42, None)
    assert args.sampling_image_size == [480, 720]


def test_a_value_may_repeat_another(parse):
    args = parse("args: {seed: 5, batch_size: '${args.seed}', negative_prompt: 'a: $5 {b}'}").args
    assert (args.batch_size, args.negative_prompt) == (5, "a: $5 {b}")


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"args: \xff\xfe")
    with pytest.raises(UserError, match="not valid YAML"):
        parse_config(SamplingArgs, "test", ["--base", str(tmp_path / "config.yaml")])


@pytest.mark.parametrize("name", ["absent.yaml", "a" * 300, "a\0b"])
def test_a_missing_file_is_named(name):
    with pytest.raises(UserError, match=f"{name}: no such file"):
        parse_config(SamplingArgs, "test", ["--base", name])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--sed", "3"], "did you mean '--seed'"),
        (["--batch-size", "two"], "invalid int value"),
        (["--input-type", "csv"], "invalid choice"),
        (["--seed", "3", "b.yaml"], "configurations come before all flags"),
        (["--seed", "3", "stray"], "unknown argument 'stray'"),
        (["--fp8", "true"], "unknown argument 'true'; a switch takes no value, use --no-"),
        (["--tile_decode=False"], "argument --tile-decode/--no-tile-decode: ignored explicit"),
    ],
)
def test_a_wrong_flag_exits_with_2_and_names_the_nearest(parse, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        parse(BASE, *flags)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert words in message and message.startswith("error: ") and message.count("\n") == 1
    assert "--help" in message


@pytest.mark.parametrize(
    ("second", "culprit", "words"),
    [
        ("args: {seed: 7}", "a.yaml", "'two' must be a whole number"),
        ("args: {batch_size: three}", "b.yaml", "'three' must be a whole number"),
        ("args: {batch_size: 3, sed: 7}", "b.yaml", "unknown key 'sed'"),
        ("args: {batch_size: 3, load: '${nothing}'}", "b.yaml", "nothing"),
        ("args: {batch_size: 3}\nmodel: 5", "b.yaml", "model must contain keys"),
    ],
)
def test_of_several_files_the_one_that_holds_the_mistake_is_named(tmp_path, second, culprit, words):
    texts = {"a.yaml": "args: {batch_size: two}", "b.yaml": second, "c.yaml": "args: {seed: 1}"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words) as failure:
        parse_config(SamplingArgs, "test", ["--base", *(str(tmp_path / name) for name in texts)])
    assert [name for name in texts if name in str(failure.value)] == [culprit]


ONE, HALF = LoraChoice("run"), LoraChoice("run", 0.5)


@pytest.mark.parametrize(
    ("value", "loras"),
    [
        ("", []),
        ("run", [ONE]),
        ("run:0.5", [HALF]),
        ("{path: run}", [ONE]),
        ("{path: run, scale: 0.5}", [HALF]),
        ("[run, {path: run, scale: 0.5}, 'run:1']", [ONE, HALF, ONE]),
        ("[{path: run, scale: -1}]", [LoraChoice("run", -1.0)]),
    ],
)
def test_loras_are_paths_with_or_without_a_scale(parse, value, loras):
    assert parse(f"args: {{lora: {value}}}").args.lora == loras


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("3", "3 is not a LoRA: write a path"),
        ("[[run]]", "is not a LoRA: write a path"),
        ("{path: run, scal: 1}", "unknown key 'scal' in .*did you mean 'scale'"),
        ("{scale: 1}", "has no path"),
        ("{path: 3}", "has no path"),
        ("{path: run, scale: .nan}", "scale nan of run must be a finite number"),
        ("{path: run, scale: strong}", "scale 'strong' of run must be a finite number"),
        ("{path: run, scale: true}", "scale True of run must be a finite number"),
        ("'run:inf'", "scale inf of run must be a finite number"),
    ],
)
def test_a_wrong_lora_is_refused_with_its_file(parse, value, words):
    with pytest.raises(UserError, match=rf"^configuration .*yaml: args.lora: .*{words}"):
        parse(f"args: {{lora: {value}}}")


def test_the_flag_for_loras_takes_several_and_replaces_the_files(parse, tmp_path):
    there = tmp_path / "run:2"
    there.mkdir()
    flags = ["--lora", "run", "run:0.5", str(there), f"{there}:-1e-1", "C:run"]
    paths = [LoraChoice(str(there)), LoraChoice(str(there), -0.1), LoraChoice("C:run")]
    assert parse("args: {lora: other}", *flags).args.lora == [ONE, HALF, *paths]
    with pytest.raises(UserError, match="scale nan of run must be a finite number"):
        parse(BASE, "--lora", "run:nan")
