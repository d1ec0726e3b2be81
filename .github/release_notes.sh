#!/usr/bin/env bash
# release_notes.sh VERSION: print the section of CHANGELOG.md for a version, without its heading.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?usage: release_notes.sh VERSION}

# The links at the end of the file belong to no section. Command substitution drops blank lines at the end.
notes=$(awk -v heading="## [$version] - " '
    index($0, "## ") == 1 { inside = index($0, heading) == 1; next }
    /^\[[^]]+\]: / { next }
    inside && (NF || printed) { print; printed = 1 }
' CHANGELOG.md)
if [[ -z $notes ]]; then
    echo "CHANGELOG.md has no section '## [$version] - YYYY-MM-DD', or an empty one: write what changed" >&2
    exit 1
fi
printf '%s\n' "$notes"
