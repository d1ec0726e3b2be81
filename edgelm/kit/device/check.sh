#!/bin/sh
# Checks this machine with the kit in this folder, offline:   sh check.sh
# Needs Python @PYTHONS@, no pip and no venv. PYTHON=/path/to/python3 names the one to use. It writes into this folder only.
wanted='@PYTHONS@'
CDPATH='' cd -- "$(dirname -- "$0")" || exit 1

python='' seen=''
for candidate in ${PYTHON:+"$PYTHON"} python3 @NAMES@ python; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    seen="$seen $candidate is Python $version."
    case " $wanted " in
        *" $version "*) python=$candidate && break ;;
    esac
done
if [ -z "$python" ]; then
    echo "check.sh: this kit needs one of Python $wanted.${seen:-" No Python was found."}" >&2
    echo "check.sh: install one of them, name one with PYTHON=/path/to/python3, or make the kit with --python" >&2
    exit 1
fi
if [ ! -f check.py ]; then
    echo "check.sh: check.py is missing: unpack the kit again" >&2
    exit 1
fi

"$python" -I check.py "$@"
status=$?
case $status in
    0 | 1 | 130) exit $status ;;
    132) echo "check.sh: Python ended with an illegal instruction: this CPU lacks what the packages need" >&2 ;;
    137) echo "check.sh: the system killed Python, mostly for lack of memory: close programs, or take a smaller model" >&2 ;;
    *) echo "check.sh: Python ended with exit code $status" >&2 ;;
esac
exit 1
