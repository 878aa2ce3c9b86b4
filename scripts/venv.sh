#!/bin/sh
# Makes .venv with everything that the package and its tests need: the pinned versions of constraints.txt.
# Uses uv if it is there, else venv and pip. PYTHON=/path/to/python chooses the interpreter.
set -eu
cd "$(dirname "$0")/.."

fits() { "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 12))' >/dev/null 2>&1; }

# A .venv whose Python is gone, or that an interrupted run left without its installer, is made anew.
if command -v uv >/dev/null 2>&1; then whole='import sys'; else whole='import pip'; fi
if ! .venv/bin/python -c "$whole" >/dev/null 2>&1; then
    python=
    for candidate in ${PYTHON:-python3.11 python3 python3.10}; do
        if fits "$candidate"; then
            python=$candidate
            break
        fi
    done
    if command -v uv >/dev/null 2>&1; then
        # uv finds further interpreters, and fetches one where it may.
        uv venv --quiet --clear --python "${python:-3.11}" .venv
    elif [ -n "$python" ]; then
        rm -rf .venv
        "$python" -m venv .venv
    else
        echo "error: Python 3.10 or 3.11 with its venv module is needed, and none of these is one:" \
            "${PYTHON:-python3.11 python3 python3.10}. Install it (on Debian and Ubuntu: apt install python3.11-venv)," \
            "or name it: make venv PYTHON=/path/to/python" >&2
        exit 1
    fi
fi

echo "installing the pinned packages into .venv (a minute or two, once)"
if command -v uv >/dev/null 2>&1; then
    # uv does not read pip's configuration; a local folder of wheels is the part of it that matters.
    uv pip install --quiet --python .venv/bin/python ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} \
        --constraint constraints.txt --editable '.[dev]'
else
    # Twice quiet: errors are printed, warnings about indexes are not.
    .venv/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
fi

# Films need a GL library. Where the system has none, a wheel of Mesa's software renderer does (84 MB; only its
# libraries are used, so none of its dependencies are installed). Without it everything but pictures works.
gl='import sys; from fleetgym.core.render import choose_gl; sys.exit(choose_gl() == "disable")'
if [ "$(uname -s)" = Linux ] && ! .venv/bin/python -c "$gl" >/dev/null 2>&1; then
    wheel='lavavu-osmesa>=1.9.9'
    echo "no GL library here: installing $wheel for films (optional)"
    if command -v uv >/dev/null 2>&1; then
        uv pip install --quiet --python .venv/bin/python --no-deps "$wheel" || true
    else
        .venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps "$wheel" || true
    fi
fi
