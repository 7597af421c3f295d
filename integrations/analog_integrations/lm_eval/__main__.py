r"""lm-eval's own command, with the model type ``analog`` known to it.

python -m analog_integrations.lm_eval run --model analog \
    --model_args pretrained=demo-out,noise=pcm,seed=0 --tasks hellaswag
"""

from analog_plugin.errors import AnalogError, require


def main() -> None:
    """Run ``lm_eval``'s command line."""
    try:
        require("lm_eval", "eval")
        from lm_eval.__main__ import cli_evaluate

        from analog_integrations.lm_eval import model  # noqa: F401  (registers it)

        cli_evaluate()
    except AnalogError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
