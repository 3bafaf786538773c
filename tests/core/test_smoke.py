from rlo_core import create_loss


def test_the_default_spec_makes_the_released_form() -> None:
    assert str(create_loss("rlo")).startswith("RootedLoss")
