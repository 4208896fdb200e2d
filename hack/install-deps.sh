#!/bin/bash
# Installs what building, testing and showing Transship needs on Debian 12.
#
#   hack/install-deps.sh             what `make build`, `test` and `demo` need
#   hack/install-deps.sh --lints     also what `.ci/run` checks with (cargo-deny)
#
# Run as root; run it as often as you like. What is already good enough stays
# as it is, and the script says so. No service is started.
#
# Debian 12's own CRIU (3.17) does not start on current kernels and 4.1 cannot
# dump a TCP socket on Linux 6.16 and later, so CRIU comes from a later Debian.
# The later releases are added with a pin below anything installed: nothing
# else on the machine follows them.
set -euo pipefail

# Versions below these were tried and do not do.
MIN_CRIU=4.2
MIN_CONTAINERD=1.7
MIN_RUNC=1.1.9
MIN_CRUN=1.14
MIN_NFT=1.0.6
MIN_CARGO=1.88
CARGO_DENY=0.20.2

SOURCES=/etc/apt/sources.list.d/transship-newer.sources
PREFERENCES=/etc/apt/preferences.d/transship
POLICY=/usr/sbin/policy-rc.d

main() {
    lints=no
    case "${1:-}" in
        "") ;;
        --lints) lints=yes ;;
        *) fail "unknown argument $1 (only --lints is known)" ;;
    esac
    [ "$(id -u)" = 0 ] || fail "must run as root: it installs Debian packages"
    . /etc/os-release
    case "${VERSION_CODENAME:-}" in
        bookworm | trixie) ;;
        *) fail "made for Debian 12 and 13, this is ${PRETTY_NAME:-unknown}; README.md lists the requirements" ;;
    esac

    need_base_packages
    need_criu
    need_runtimes
    need_rust
    if [ $lints = yes ]; then
        need_cargo_deny
    fi
    say "done"
}

# --- the steps, in the order they run ---------------------------------------

need_base_packages() {
    local wanted=() package
    # redis-tools, not redis-server: it holds the server's program (the other
    # package adds a link and a service), and no test wants the service.
    # postgresql: its programs, for a test; no service of it is started.
    # iptables: CRIU saves a network namespace's rules with it.
    for package in busybox-static ca-certificates containernetworking-plugins gcc git \
        iproute2 iptables libc6-dev make pkg-config postgresql procps protobuf-compiler python3 \
        redis-tools tar util-linux; do
        installed "$package" || wanted+=("$package")
    done
    if [ ${#wanted[@]} = 0 ]; then
        say "base packages: already installed"
    else
        say "base packages: installing ${wanted[*]}"
        refresh
        add "${wanted[@]}"
    fi
}

need_criu() {
    local version
    version=$(command -v criu >/dev/null && criu --version 2>/dev/null | sed -n 's/^Version: //p' || true)
    if at_least "$version" $MIN_CRIU && ldconfig -p | grep -q 'libcriu\.so\.2'; then
        say "criu $version, libcriu.so.2: already good"
        return
    fi
    say "criu ${version:-none} or libcriu.so.2 missing, $MIN_CRIU or later wanted: installing from forky"
    newer_releases
    # `package/forky` would bring forky's C library with it; a plain version
    # does not, and the rest of the dependencies comes from trixie.
    local package pinned=()
    for package in criu libcompel1 libnet9 libnl-3-200 libcriu2; do
        version=$(version_in forky $package)
        [ -z "$version" ] || pinned+=("$package=$version")
    done
    if ! add -t trixie "${pinned[@]}"; then
        say "criu: trixie's libraries do not fit forky's CRIU any more, taking forky's"
        add -t forky criu libcriu2
    fi
    version=$(criu --version | sed -n 's/^Version: //p')
    at_least "$version" $MIN_CRIU || fail "criu is $version after installation, $MIN_CRIU wanted"
}

need_runtimes() {
    local wanted=()
    wants containerd $MIN_CONTAINERD "$(containerd --version 2>/dev/null || true)" && wanted+=(containerd)
    wants runc $MIN_RUNC "$(runc --version 2>/dev/null || true)" && wanted+=(runc)
    wants crun $MIN_CRUN "$(crun --version 2>/dev/null || true)" && wanted+=(crun)
    wants nft $MIN_NFT "$(nft --version 2>/dev/null || true)" && wanted+=(nftables)
    [ ${#wanted[@]} != 0 ] || return 0
    newer_releases
    add -t trixie "${wanted[@]}"
}

# The compiler may be the distribution's or rustup's, root's or not: only its
# version counts.
need_rust() {
    local version
    version=$(cargo --version 2>/dev/null | cut -d' ' -f2 || true)
    if at_least "$version" $MIN_CARGO; then
        say "cargo $version: already good"
        return
    fi
    say "cargo ${version:-none}, $MIN_CARGO or later wanted: installing rustup from trixie and its stable toolchain"
    newer_releases
    add -t trixie rustup
    rustup toolchain install stable --profile minimal --component clippy,rustfmt
    rustup default stable
}

# Compiled without optimisation: it runs for seconds, its compilation for many
# minutes otherwise.
need_cargo_deny() {
    if cargo deny --version >/dev/null 2>&1; then
        say "$(cargo deny --version): already good"
        return
    fi
    say "cargo-deny: compiling $CARGO_DENY (under a minute, once)"
    CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --locked --debug cargo-deny@$CARGO_DENY
}

# --- helpers -----------------------------------------------------------------

say() { printf 'install-deps: %s\n' "$*"; }

fail() {
    printf 'install-deps: %s\n' "$*" >&2
    exit 1
}

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

at_least() { [ -n "$1" ] && dpkg --compare-versions "$1" ge "$2"; }

# True when NAME is older than MINIMUM in what it says about itself.
wants() {
    local name=$1 minimum=$2 version
    version=$(grep -oE '[0-9]+(\.[0-9]+)+' <<<"$3" | head -n1 || true)
    if at_least "$version" "$minimum"; then
        say "$name $version: already good"
        return 1
    fi
    say "$name ${version:-none}, $minimum or later wanted: installing from trixie"
}

version_in() { apt-cache madison "$2" | awk -F' *[|] *' -v suite=" $1/" 'index($3, suite) { print $2; exit }'; }

refreshed=no
refresh() {
    [ $refreshed = no ] || return 0
    apt-get update -q || fail "apt-get update failed"
    refreshed=yes
}

# Adds the later releases from the mirror this machine uses already.
newer_releases() {
    refresh
    local known suites=() suite
    known=$(apt-get indextargets --format '$(CODENAME) $(REPO_URI)' 'Created-By: Packages')
    for suite in trixie forky; do
        grep -q "^$suite " <<<"$known" || suites+=("$suite")
    done
    [ ${#suites[@]} != 0 ] || return 0
    local mirror keyring
    mirror=$(awk -v own="$VERSION_CODENAME" '$1 == own { print $2; exit }' <<<"$known")
    [ -n "$mirror" ] || fail "no apt source for $VERSION_CODENAME to take the mirror from"
    keyring=$(keyring_of "$mirror")
    say "apt: adding ${suites[*]} from this machine's mirror, pinned below everything installed"
    {
        echo "Types: deb"
        echo "URIs: $mirror"
        echo "Suites: ${suites[*]}"
        echo "Components: main"
        [ -z "$keyring" ] || echo "Signed-By: $keyring"
    } >$SOURCES
    printf 'Package: *\nPin: release n=trixie\nPin-Priority: 50\n\nPackage: *\nPin: release n=forky\nPin-Priority: 40\n' >$PREFERENCES
    if ! apt-get update -q; then
        # Every later update would fail as well.
        rm -f $SOURCES $PREFERENCES
        fail "apt cannot use ${suites[*]} of $mirror"
    fi
}

# The key file that the source of MIRROR is verified with, in either of apt's
# formats; nothing where apt uses its common keyrings.
keyring_of() {
    local mirror=${1%/} found
    found=$(
        find /etc/apt/sources.list.d -name '*.sources' -exec cat {} + |
            awk -v RS= -v mirror="$mirror" 'index($0, mirror) && match($0, /Signed-By:[ \t]*\/[^ \t\n]+/) {
                print substr($0, RSTART + 10, RLENGTH - 10) }'
        find /etc/apt -name '*.list' -exec cat {} + |
            sed -n "\|$mirror|s/.*signed-by=\(\/[^] ]*\).*/\1/p"
    )
    awk 'NR == 1 { print $1 }' <<<"$found"
}

# Packages start their services on installation unless this policy forbids it.
add() {
    if [ -z "${policy_kept:-}" ]; then
        policy_kept=$(mktemp -d)
        trap restore_policy EXIT
        if [ -e $POLICY ]; then
            mv $POLICY "$policy_kept/"
        fi
        printf '#!/bin/sh\nexit 101\n' >$POLICY
        chmod 755 $POLICY
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
        -o DPkg::Lock::Timeout=300 -o Dpkg::Options::=--force-confold "$@"
}

restore_policy() {
    rm -f $POLICY
    [ ! -e "$policy_kept/policy-rc.d" ] || mv "$policy_kept/policy-rc.d" $POLICY
    rmdir "$policy_kept"
}

main "$@"
