#!/usr/bin/env bash
# bench/gpu.sh [STAGE ...]: everything that wants a GPU, in stages of at most 8 minutes; without one a dry run on the CPU.
#
# Stages: test_<op> and bench_<op> of every kernel, test_launch, doctor; the loops' waterfalls, lpo-<family> and lrm-<family>;
# memory-<setting>, README's memory settings as measured; world-<seed>, the embedded world. All by default, less those that an
# earlier call has finished (build/gpu/; remove it to begin again); a waterfall goes on with its next row. Logs and rows go to
# $OUT (bench/results) as they come, beside the rows that bench/results has already. PYTHON: the interpreter; .site/ may hold
# packages that it lacks. COMMIT: what is measured, where there is no git. Exit status 1 if a stage fails.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results} python=${PYTHON:-python3} state=build/gpu
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/build/inductor} BENCH_WORK=${BENCH_WORK:-$PWD/build/models}
export PYTHONPATH=$PWD/.site:$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out" "$state"
here=$(realpath "$out")
[ "$out" -ef bench/results ] || (cd bench/results && find . -name '*.json' ! -path './cpu/*' -exec cp -n --parents {} "$here" \;)

stages=("$@")
if [ $# -eq 0 ]; then
    for file in lpo_fast/system/launch.py kernels/*.py; do stages+=("test_$(basename "$file" .py)"); done
    stages+=(doctor)
    for file in kernels/*.py; do stages+=("bench_$(basename "$file" .py)"); done
    if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        families=(sd15 sdxl sd21) settings=(sd15 sdxl lrm-xl)
    else
        families=(small) settings=(small)
    fi
    for family in "${families[@]}"; do
        stages+=("lpo-$family")
        [ "$family" = sd21 ] || stages+=("lrm-$family")  # SD2.1 is aligned with an SD1.5 LRM
    done
    for setting in "${settings[@]}"; do stages+=("memory-$setting"); done
    for seed in 0 1 2; do stages+=("world-$seed"); done
fi
failed=()
for stage in "${stages[@]}"; do
    if [ $# -eq 0 ] && [ -e "$state/$stage" ]; then continue; fi
    pytest=(pytest --disable-warnings -p no:cacheprovider)
    case $stage in
        test_launch) command=(-m "${pytest[@]}" tests/system/test_launch.py) ;;
        test_*) command=(-m "${pytest[@]}" "tests/kernels/$stage.py") ;;
        bench_*) command=(-m "${pytest[@]}" "bench/bench_kernels.py::test_${stage#bench_}" --benchmark-only --results "$out") ;;
        lpo-*|lrm-*) command=(-m "${pytest[@]}" "bench/bench_${stage%%-*}.py" -k "${stage#*-}" --benchmark-only --results "$out") ;;
        memory-*) command=(bench/tools/memory.py "${stage#*-}" --out "$out/$stage.md") ;;
        world-*) command=(-m lpo_fast.shapes.evaluate --seeds "${stage#*-}") ;;
        doctor) command=(-m lpo_fast.doctor --golden tests/golden) ;;
        *) echo "no such stage: $stage"; exit 2 ;;
    esac
    echo "== $stage"
    start=$SECONDS
    if timeout 480 "$python" "${command[@]}" 2>&1 | tee "$out/gpu-$stage.txt"; then touch "$state/$stage"; else failed+=("$stage"); fi
    echo "== $stage: $((SECONDS - start)) s"
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
