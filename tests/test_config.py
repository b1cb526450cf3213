"""Settings: precedence, origins, every problem at once, and a way back from the dump."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from minilm.config import contradictions, dump, flatten, parse_flags, resolve
from minilm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Optim:
    learning_rate: Annotated[float, Field(gt=0, description="highest learning rate")] = 1e-3
    clip_norm: Annotated[float | None, Field(gt=0)] = 1.0
    schedule: Literal["cosine", "none"] = "cosine"


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: Annotated[int, Field(gt=0)] = 10
    prompts: list[str] = field(default_factory=list)
    fused: bool = False

    def problems(self):
        if self.steps == 13:
            yield "steps", "13 is not allowed"


@dataclass(frozen=True, kw_only=True)
class Config:
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = write(tmp_path, "optim:\n  learning_rate: 2e-4\n  clip_norm: 0.5\n")
    resolved = resolve(
        Config, file=file, overrides=["--optim.clip_norm=0.25", "--train.steps", "7", "--train.fused"]
    )
    assert flatten(resolved.value) == {
        "optim.learning_rate": 2e-4,  # YAML 1.1 reads 2e-4 as text: it must still become a number
        "optim.clip_norm": 0.25,
        "optim.schedule": "cosine",
        "train.steps": 7,
        "train.prompts": [],
        "train.fused": True,
    }
    assert resolved.origins == {
        "optim.learning_rate": f"{file}:2",
        "optim.clip_norm": "--optim.clip_norm",
        "optim.schedule": "default",
        "train.steps": "--train.steps",
        "train.prompts": "default",
        "train.fused": "--train.fused",
    }


def test_none_lists_and_a_choice_that_is_called_none():
    value = resolve(
        Config, overrides=["--optim.clip_norm=none", "--optim.schedule=none", "--train.prompts=[a b, 'c, d']"]
    ).value
    assert value.optim.clip_norm is None
    assert value.optim.schedule == "none"
    assert value.train.prompts == ["a b", "c, d"]
    assert resolve(Config, overrides=["--train.prompts=a,b"]).value.train.prompts == ["a", "b"]


def test_every_problem_is_reported_at_once_with_its_place_and_a_suggestion(tmp_path):
    file = write(tmp_path, "optim:\n  learnig_rate: 1\n\ntrain:\n  steps: -3\nfoo:\n  steps: 1\n")
    with pytest.raises(ConfigError) as caught:
        resolve(
            Config, file=file, overrides=["--train.fused=perhaps", "--train.learning_rate=1", "--optim.lr=1"]
        )
    text = str(caught.value)
    assert text.startswith("6 problems")
    for part in (
        f"Unknown setting optim.learnig_rate ({file}:2). Did you mean optim.learning_rate",
        f"train.steps ({file}:5): input should be greater than 0, not -3.",
        "Unknown setting foo.steps",
        "Did you mean train.steps?",
        "--train.fused:",
        "Unknown setting train.learning_rate. Did you mean optim.learning_rate",
        "Unknown setting optim.lr. Did you mean optim.learning_rate",
    ):
        assert part in text


def test_a_value_is_not_rounded_to_fit_its_type():
    with pytest.raises(ConfigError, match=r"--train.steps: .*integer"):
        resolve(Config, overrides=["--train.steps=2.5"])


def test_problems_methods_are_asked_and_named_by_origin():
    with pytest.raises(ConfigError, match=r"--train.steps: 13 is not allowed"):
        resolve(Config, overrides=["--train.steps=13"])
    assert list(contradictions(Config(train=Train(steps=13)))) == [("train.steps", "13 is not allowed")]


def test_the_dump_is_read_back_to_the_same_settings(tmp_path):
    value = resolve(Config, overrides=["--train.prompts=[\"a: b\", '']", "--optim.clip_norm=none"]).value
    assert resolve(Config, file=write(tmp_path, dump(value))).value == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: [1, 2", "not valid YAML"),
        ("- a\n", "must consist of sections"),
        ("optim: 3\n", "is a section"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(Config, file=write(tmp_path, text))
    assert "run.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train:\n  steps: 3\noptim:\n  clip_norm: 1\ntrain:\n  steps: 4\n",
            r":5: train was given before, in line 1",
        ),
        ("train:\n  steps: 3\n  fused: true\n  steps: 4\n", r":4: steps was given before, in line 2"),
        ("train: &t\n  steps: 3\noptim:\n  <<: *t\n", r":4: merge keys"),
        ("train:\n  steps: yes\n", r"train\.steps \(.*:2\): true and false mean nothing here"),
        ("optim:\n  clip_norm: on\n", r"optim\.clip_norm \(.*:2\): true and false mean nothing here"),
    ],
)
def test_what_yaml_would_take_silently_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        resolve(Config, file=write(tmp_path, text))


def test_missing_file_and_stray_word():
    with pytest.raises(ConfigError, match=r"no settings file nowhere\.yaml"):
        resolve(Config, file=Path("nowhere.yaml"))
    with pytest.raises(ConfigError, match="'steps=3'"):
        list(parse_flags(["steps=3"]))


def test_a_setting_given_twice_takes_the_last():
    assert resolve(Config, overrides=["--train.steps=1", "--train.steps=2"]).value.train.steps == 2


def test_a_section_may_choose_its_class():
    @dataclass(frozen=True, kw_only=True)
    class Big(Train):
        layers: int = 1

    def choose(raw):
        size = raw.pop("size", None)
        return Big, {"steps": 99, "layers": 8} if size == "large" else {}

    resolved = resolve(Config, overrides=["--train.size=large", "--train.layers=2"], choose={"train": choose})
    assert resolved.value.train == Big(steps=99, layers=2)
    assert resolved.origins["train.steps"] == "train.size"
