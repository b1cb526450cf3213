# shellcheck shell=bash disable=SC2034  # the variables are for those who source it
# Sourced by the other facts scripts: the environment, and what SCALE=cpu (default) and SCALE=full stand for.
SCALE=${SCALE:-cpu}
case $SCALE in
  cpu)
    corpus=(--entities 1000 --relations 4 --values 64 --mentions 120000 --validation-mentions 2000 --questions 250)
    vocabulary=1400 side=64 width=16 deep=9
    table=(--model.value_side=64 --model.value_key_dim=32)
    memory=(--model.key_dim=64 --model.router_dim=128 --model.memory_heads=4 --model.memory_head_dim=16)
    ;;
  full)
    corpus=(--entities 4096 --relations 8 --values 256 --mentions 1350000 --validation-mentions 8000 --questions 1000)
    vocabulary=4000 side=256 width=16 deep=18
    table=(--model.value_side=256 --model.value_key_dim=128)
    memory=(--model.key_dim=128 --model.router_dim=256 --model.memory_heads=8 --model.memory_head_dim=32)
    ;;
  *)
    echo "SCALE is $SCALE: choose cpu or full." >&2
    exit 2
    ;;
esac
facts=data/facts/$SCALE
runs=runs/facts-$SCALE
if ! command -v minilm > /dev/null; then # not `import minilm`: any Python can import it from the checkout
  source run_file/install.sh
  install_minilm dashboard
fi
