#!/usr/bin/env bash
# make release VERSION=0.3.0: check that the checkout is ready for a release, then make the annotated tag v0.3.0, whose
# message is the changelog's section. Nothing is pushed: release.yml builds the release when the tag is.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-}

refuse() {
    echo "No release: $1" >&2
    exit 1
}

[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || refuse "give the version as three numbers, make release VERSION=0.3.0"
branch=$(git branch --show-current)
[[ $branch == main ]] || refuse "releases are made on main, this is '$branch': git switch main"
[[ -z $(git status --porcelain) ]] || refuse "there are uncommitted changes: commit or stash them (git status)"
if git rev-parse --quiet --verify "refs/tags/v$version" >/dev/null; then
    refuse "the tag v$version exists: take the next version, tags are never moved"
fi

# Three files hold the version: the wheel's, the program's own and the citation's.
has_line() { grep -qx "$2" "$1" || refuse "$1 has another version: it needs the line $2"; }
has_line pyproject.toml "version = \"$version\""
has_line edgelm/version.py "__version__ = \"$version\""
has_line CITATION.cff "version: $version"
notes=$(.github/release_notes.sh "$version") || refuse "CHANGELOG.md says nothing about $version"

# `--cleanup=whitespace` keeps the headings, which begin with git's sign of a comment.
git tag --annotate "v$version" --cleanup=whitespace --message "EdgeLM $version" --message "$notes"
echo "Made the tag v$version. Publish it: git push origin main v$version"
