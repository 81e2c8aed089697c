"""What a person reads when a spec is wrong: every problem at once, with its place and a suggestion."""

from pathlib import Path

import pytest

from jobs.grid import load_job
from jobs.spec import SpecError, load_spec

TRAIN = """\
kind: train
run_dir: runs/x
data: {shards: runs/codes}
model: {size: B, window_size: 4}
num_steps: 5
"""


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_spec(path, overrides)
    assert "\n".join(caught.value.problems) == str(caught.value)
    return [problem.replace(f"{path}", "spec.yaml") for problem in caught.value.problems]


def test_all_problems_of_a_file_are_told_at_once_in_line_order(tmp_path: Path) -> None:
    text = """\
kind: train
run_dir: runs/x
num_step: 5e3
data:
  shards: runs/codes
  shuffle_window_shards: 0
  seeed: 4
model:
  num_layers: abc
  num_heads: 6
  num_heads: 7
  window_size: 2.5
optimizer: {betas: [0.9], learning_rate: -1, schedule: cosin}
engine: 5
noise:
  offset_weights: 3
cluster:
  num_workers: 1.5
  machines: 3
"""
    assert problems(tmp_path, text) == [
        "spec.yaml:3: num_step is not a field; did you mean num_steps?",
        "spec.yaml:6: data.shuffle_window_shards must be above 0, got 0",
        "spec.yaml:7: data.seeed is not a field; did you mean seed?",
        "spec.yaml:9: model.num_layers must be a whole number, got 'abc'",
        "spec.yaml:11: model.num_heads is given twice, first on line 10; keep one",
        "spec.yaml:12: model.window_size must be a whole number, got 2.5",
        "spec.yaml:13: optimizer.learning_rate must be above 0, got -1",
        "spec.yaml:13: optimizer.betas must have more values, got [0.9]",
        "spec.yaml:13: optimizer.schedule must be one of constant, cosine, got 'cosin'; did you mean cosine?",
        "spec.yaml:14: engine must be a group of fields, got 5",
        "spec.yaml:16: noise.offset_weights must be a list, got 3",
        "spec.yaml:18: cluster.num_workers must be a whole number, got 1.5",
        "spec.yaml:19: cluster.machines is not a field; "
        "the fields here are launcher, address, num_workers, cpus_per_worker, gpus_per_worker, min_workers, "
        "node_wait_s, max_failures",
    ]


def test_a_misspelled_field_does_not_hide_cross_field_problems(tmp_path: Path) -> None:
    text = TRAIN.replace("num_steps", "num_stps") + "noise:\n  schedule: linear\n  offset_weights: [1, 2]\n"
    assert problems(tmp_path, text) == [
        "spec.yaml:5: num_stps is not a field; did you mean num_steps?",
        "spec.yaml:8: noise.offset_weights must have model.window_size = 4 values, got 2",
    ]


def test_a_rule_of_a_group_names_the_group(tmp_path: Path) -> None:
    text = TRAIN.replace("{size: B, window_size: 4}", "{size: B, model_dim: 64}")
    message = "model: size 'B' fixes num_layers, num_heads and model_dim; remove them or the size"
    assert problems(tmp_path, text) == [f"spec.yaml:4: {message}"]


def test_a_missing_field_is_told_with_its_meaning(tmp_path: Path) -> None:
    text = TRAIN.replace("num_steps: 5\n", "")
    assert problems(tmp_path, text) == ["spec.yaml:1: num_steps is required: Optimiser steps of the whole run"]
    text = "kind: tokenize\nrun_dir: x\ntokenizer: {weights: a}\nsource:\n  kind: image_folder\n"
    meaning = "Folder or s3:// URL that the images lie below"
    assert problems(tmp_path, text) == [f"spec.yaml:4: source.root is required: {meaning}"]


def test_unions_are_told_by_their_kinds(tmp_path: Path) -> None:
    text = "kind: tokenize\nrun_dir: x\nsource:\n  kind: web_dataset\ntokenizer: {weights: x, network: vq15}\n"
    assert problems(tmp_path, text) == [
        "spec.yaml:3: source must have kind: one of webdataset, parquet, image_folder, img2dataset, got 'web_dataset'; "
        "did you mean webdataset?",
        "spec.yaml:5: tokenizer.network must be one of vq16, vq8, got 'vq15'; did you mean vq16?",
    ]


@pytest.mark.parametrize(("given", "got"), [("", "neither"), ("  urls: [a]\n  urls_file: b\n", "both")])
def test_a_source_of_files_names_them_in_one_way(tmp_path: Path, given: str, got: str) -> None:
    text = f"kind: tokenize\nrun_dir: x\nsource:\n  kind: parquet\n{given}tokenizer: {{weights: x}}\n"
    message = f"source: exactly one of urls and urls_file must be given, got {got}; keep one"
    assert problems(tmp_path, text) == [f"spec.yaml:3: {message}"]


def test_fields_of_a_union_member_get_suggestions_of_that_member(tmp_path: Path) -> None:
    text = "kind: tokenize\nrun_dir: x\nsource:\n  kind: image_folder\n  rot: y\ntokenizer: {weights: x}\n"
    assert problems(tmp_path, text) == ["spec.yaml:5: source.rot is not a field; did you mean root?"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            "spec.yaml:1: the spec is empty; begin with kind: and one of fit_tokenizer, tokenize, train, sample, "
            "evaluate",
        ),
        ("- 1\n", "spec.yaml:1: a spec must be a mapping of fields, got [1]"),
        ("run_dir: x\n", "spec.yaml:1: kind is required, one of fit_tokenizer, tokenize, train, sample, evaluate"),
        (
            "# a comment\nkind: trian\n",
            "spec.yaml:2: kind must be one of fit_tokenizer, tokenize, train, sample, evaluate, got 'trian'; "
            "did you mean train?",
        ),
        (
            "kind: train\na: [1,\nb: 2\n",
            "spec.yaml:4: not valid YAML: expected ',' or ']', but got '<stream end>'; "
            "mend the line or the one before it",
        ),
        ("kind: &a train\nb: *a\n", "spec.yaml:2: *a is an alias, which specs do not have; write the value out"),
        ("kind: train\na: " + 3000 * "[", "spec.yaml:2: a spec must nest at most 32 levels, got more; flatten it"),
        (
            "kind: train\nrun_dir: x\n# \x07\n",
            "spec.yaml:3: not valid YAML: unacceptable character #x0007: special characters are not allowed; "
            "mend the line or the one before it",
        ),
    ],
)
def test_what_is_no_spec_at_all_is_told_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    assert problems(tmp_path, text) == [message]


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nope\.yaml: reading the spec: no such file or directory; check the path"):
        load_spec(tmp_path / "nope.yaml")


def test_overrides_are_typed_and_win(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(TRAIN)
    overrides = ["num_steps=7", "optimizer.learning_rate=1e-3", "noise.offset_weights=[1, 0, 0, 0]", "warm_start=null"]
    spec = load_spec(path, overrides)
    assert spec.kind == "train"
    assert spec.num_steps == 7
    assert spec.optimizer.learning_rate == 0.001
    assert spec.noise.offset_weights == (1.0, 0.0, 0.0, 0.0)
    assert spec.model.window_size == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.window_sze=2", "model.window_sze is not a field; did you mean window_size?"),
        ("num_steps=many", "num_steps must be a whole number, got 'many'"),
        ("num_steps", "an override must be field=value or group.field=value, got 'num_steps'"),
        ("model.size.x=3", "model.size holds 'B' and has no fields; set it as a whole"),
        ("model.size=[", "the value must be YAML, got '['; quote it"),
        ("noise.offset_weights=[1]", "noise.offset_weights must have model.window_size = 4 values, got 1"),
        ("noise.scored_stride=257", "noise.scored_stride must be in [1, model.codes_per_side ** 2 = 256], got 257"),
    ],
)
def test_a_problem_of_an_override_names_the_override(tmp_path: Path, override: str, message: str) -> None:
    assert problems(tmp_path, TRAIN, override) == [f"--set {override}: {message}"]


def test_a_list_that_may_not_be_empty_says_so(tmp_path: Path) -> None:
    text = "kind: sample\nrun_dir: x\nweights: y\ntokenizer: {weights: z}\nlabels: []\n"
    assert problems(tmp_path, text) == ["spec.yaml:5: labels must have at least 1 values, got 0"]
    text = "kind: fit_tokenizer\nrun_dir: x\nimages: y\nvalidation_images: z\nnetwork: {channel_multipliers: []}\n"
    assert problems(tmp_path, text) == ["spec.yaml:5: network.channel_multipliers must have at least 1 values, got 0"]


def test_a_list_of_too_many_values_says_how_many_it_may_have(tmp_path: Path) -> None:
    assert problems(tmp_path, TRAIN + "optimizer: {betas: [0.9, 0.9, 0.9]}\n") == [
        "spec.yaml:6: optimizer.betas must have at most 2 values, got 3"
    ]


@pytest.mark.parametrize("url", ["127.0.0.1:9000", "localhost:9000", "//host", "s3://host"])
def test_an_endpoint_without_its_scheme_is_refused(tmp_path: Path, url: str) -> None:
    assert problems(tmp_path, TRAIN, f"s3.endpoint_url='{url}'") == [
        f"--set s3.endpoint_url='{url}': s3.endpoint_url: an endpoint must begin with http:// or https://, "
        f"got {url!r}; write it before the host"
    ]


def test_a_seed_that_no_draw_can_be_keyed_by_is_refused(tmp_path: Path) -> None:
    message = "seed must be below 72057594037927936, got 72057594037927936"
    assert problems(tmp_path, TRAIN + "seed: 72057594037927936\n") == [f"spec.yaml:6: {message}"]


def test_an_override_that_opens_a_group_is_the_place_of_what_is_wrong_with_it(tmp_path: Path) -> None:
    assert problems(tmp_path, TRAIN, "foo.bar.baz=1", "engine.global_batch_size=47") == [
        "--set foo.bar.baz=1: foo is not a field; the fields here are kind, run_dir, data, model, recipe, noise, "
        "optimizer, "
        "engine, checkpoint, validation, num_steps, log_every_n_steps, max_skipped_steps, wandb_project, warm_start, "
        "seed, s3, cluster",
        "--set engine.global_batch_size=47: engine.global_batch_size must be a multiple of "
        "micro_batch_size * world_size = 1 * 2 = 2, got 47; use 46 or 48",
    ]


def test_numbers_that_json_has_not_and_betas_of_one_are_refused(tmp_path: Path) -> None:
    told = problems(tmp_path, TRAIN + "optimizer: {max_grad_norm: .inf, learning_rate: .nan, betas: [1.0, 0.95]}\n")
    assert [line.split(", got ")[0] for line in told] == [
        "spec.yaml:6: optimizer.learning_rate must be a finite number",
        "spec.yaml:6: optimizer.betas.0 must be below 1",
        "spec.yaml:6: optimizer.max_grad_norm must be a finite number",
    ]


def test_true_and_false_are_no_numbers(tmp_path: Path) -> None:
    text = TRAIN.replace("num_steps: 5", "num_steps: yes") + "optimizer: {betas: [0.9, off]}\n"
    assert problems(tmp_path, text) == [
        "spec.yaml:5: num_steps must be a number, got True; write it in digits",
        "spec.yaml:6: optimizer.betas.1 must be a number, got False; write it in digits",
    ]


LEADING_ZEROS = "remove them, write 0o for octal, or quote a text"


def test_values_that_yaml_cannot_make_are_told_with_all_other_problems(tmp_path: Path) -> None:
    text = """\
kind: train
run_dir: "runs/\\ud800"
data: {shards: !!str 12}
model: {size: B, window_size: !!int four}
num_steps: 010
seed: SEED
sede: 1
log_every_n_steps: !!python/object:os.system x
""".replace("SEED", "9" * 5000)
    assert problems(tmp_path, text) == [
        r"spec.yaml:2: run_dir: a text must have whole characters, got 'runs/\ud800'; write the character itself",
        "spec.yaml:3: data.shards: a value must have no tag, got !!str; leave it out",
        "spec.yaml:4: model.window_size: a value must have no tag, got !!int; leave it out",
        "spec.yaml:4: model.window_size must be a whole number, got 'four'",
        f"spec.yaml:5: num_steps: a number must have no leading zeros, got 010; {LEADING_ZEROS}",
        f"spec.yaml:6: seed must be a whole number, got '{56 * '9'}...",
        "spec.yaml:7: sede is not a field; did you mean seed?",
        "spec.yaml:8: log_every_n_steps: a value must have no tag, got !!python/object:os.system; leave it out",
        "spec.yaml:8: log_every_n_steps must be a whole number, got 'x'",
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("!!int x", "num_steps: a value must have no tag, got !!int; leave it out"),
        ("010", f"num_steps: a number must have no leading zeros, got 010; {LEADING_ZEROS}"),
        ("1:30", "num_steps must be a whole number, got '1:30'"),
        ("2024-13-45", "num_steps must be a whole number, got '2024-13-45'"),
        ("{a: 1, a: 2}", "num_steps.a is given twice; keep one"),
        (3000 * "[", "a spec must nest at most 32 levels, got more; flatten it"),
        ("*a", "*a is an alias, which specs do not have; write the value out"),
    ],
)
def test_a_value_of_an_override_is_read_as_strictly(tmp_path: Path, value: str, message: str) -> None:
    assert problems(tmp_path, TRAIN, f"num_steps={value}")[0] == f"--set num_steps={value}: {message}"


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(TRAIN.replace("runs/x", "2024-13-45").replace("num_steps: 5", "num_steps: 0o17\nseed: 0x1F"))
    spec = load_spec(path, ["log_every_n_steps=+8", "optimizer.learning_rate=5.e-4", "optimizer.max_grad_norm=.5"])
    assert spec.kind == "train"
    assert (spec.run_dir, spec.num_steps, spec.seed, spec.log_every_n_steps) == ("2024-13-45", 15, 31, 8)
    assert (spec.optimizer.learning_rate, spec.optimizer.max_grad_norm) == (0.0005, 0.5)


@pytest.mark.parametrize("grid", ["", "grid: {seed: [0, 1]}\n"], ids=["job", "study"])
def test_a_place_must_be_given_and_has_no_variables(tmp_path: Path, grid: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(TRAIN.replace("runs/x", "''").replace("runs/codes", "$CODES") + "warm_start: ' '\n" + grid)
    with pytest.raises(SpecError) as caught:
        load_job(path, ["validation={shards: $HOME/x}"])
    assert str(caught.value).replace(str(path), "spec.yaml").splitlines() == [
        "--set validation={shards: $HOME/x}: validation.shards: environment variables are not expanded, got "
        "'$HOME/x'; write the path out",
        "spec.yaml:2: run_dir: a path or URL must be given, got ''; name one",
        "spec.yaml:3: data.shards: environment variables are not expanded, got '$CODES'; write the path out",
        "spec.yaml:6: warm_start: a path or URL must be given, got ' '; name one",
    ]


def test_a_url_one_slash_short_is_no_path(tmp_path: Path) -> None:
    rule = "a URL must have two slashes after its scheme, got 's3:/bucket/x'; write s3://bucket/x"
    assert problems(tmp_path, TRAIN.replace("runs/x", "s3:/bucket/x")) == [f"spec.yaml:2: run_dir: {rule}"]


def test_a_fit_on_s3_is_refused_where_its_spec_is_checked(tmp_path: Path) -> None:
    text = "kind: fit_tokenizer\nrun_dir: s3://bucket/x\nimages: s3://bucket/y\nvalidation_images: z\nnum_steps: 9\n"
    rule = "it must be local or mounted, got 's3://bucket/{}'; use a directory path"
    found = problems(tmp_path, text)
    assert [f"spec.yaml:2: run_dir: {rule.format('x')}", f"spec.yaml:3: images: {rule.format('y')}"] == found[:2]


def test_the_root_of_a_source_must_be_given(tmp_path: Path) -> None:
    text = "kind: tokenize\nrun_dir: x\nsource: {kind: image_folder, root: ''}\ntokenizer: {weights: x}\n"
    assert problems(tmp_path, text) == ["spec.yaml:3: source.root: a path or URL must be given, got ''; name one"]
