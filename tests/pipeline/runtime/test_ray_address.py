import pytest

from pipeline.errors import UsageError
from pipeline.runtime.ray_address import check_address, cluster_address


@pytest.mark.parametrize(
    ("address", "meant"),
    [
        (None, None),
        ("", None),
        ("local", None),
        ("auto", "auto"),
        ("head:6379", "head:6379"),
        ("10.0.0.1:6379", "10.0.0.1:6379"),
        ("[::1]:6379", "[::1]:6379"),
    ],
)
def test_addresses_mean_a_cluster_or_this_machine(
    address: str | None, meant: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_address(address)
    assert cluster_address(address) == meant


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("http://127.0.0.1:8265", "dashboard"),
        ("https://ray.example.org", "dashboard"),
        ("ray://head:10001", "ray job submit"),
        ("head", "HOST:PORT"),
        ("head:99999", "HOST:PORT"),
        ("redis://head:6379", "HOST:PORT"),
    ],
)
def test_what_is_no_address_of_a_cluster_is_refused_with_what_to_give_instead(
    address: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UsageError, match=complaint) as caught:
        check_address(address)
    assert str(caught.value).startswith(f"--address {address}: ")


def test_an_address_of_the_environment_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    for address in ("http://127.0.0.1:8265", "auto"):  # Ray lets the environment decide what `auto` is
        with pytest.raises(UsageError, match=r"RAY_ADDRESS=http://127.0.0.1:8265: .*Unset it"):
            cluster_address(address)
