#!/bin/sh
# Installs the Debian packages that a purpose needs, only those that are missing.
#
#   scripts/install-deps.sh demo|test|bench
#
# Nothing that is installed here gets started, now or at the next boot: nginx would take port 80
# and docker would change the firewall of a machine that only wanted to see a demo.
set -eu

purpose=${1:-}
python=${PYTHON:-python3}
web="nginx-light libnginx-mod-http-lua lua-cjson"
lab="docker.io docker-compose debootstrap iproute2 iptables procps util-linux"
stores="etcd-server zookeeper"
peers="haproxy"
tools="lua-check wrk openssl curl ca-certificates"

case $purpose in
    demo) packages=$web ;;
    test) packages="$web $lab $stores $tools" ;;
    bench) packages="$web $lab $tools $peers" ;;
    *)
        echo "usage: scripts/install-deps.sh demo|test|bench" >&2
        exit 2
        ;;
esac

# Any Python that is new enough and can make virtual environments will do; else Debian's.
if ! "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    packages="$packages python3 python3-venv"
fi

installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

missing=
if command -v dpkg-query >/dev/null; then
    for package in $packages; do
        installed "$package" || missing="$missing $package"
    done
else
    echo "install-deps: this is no Debian or Ubuntu; install what corresponds to: $packages" >&2
    exit 1
fi
[ -n "$missing" ] || exit 0

echo "install-deps: installing$missing"
if [ "$(id -u)" = 0 ]; then
    as_root=
elif command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; then
    as_root=sudo
else
    {
        echo "install-deps: packages are missing, and only root can install them. Run"
        echo "    apt-get update && apt-get install -y --no-install-recommends$missing"
        echo "as root (nginx and docker would start: stop them if you do not want that),"
        echo "or run make as root once."
    } >&2
    exit 1
fi

# The rest runs as root, in one go, so that sudo asks once at most.
# shellcheck disable=SC2016
$as_root env DEBIAN_FRONTEND=noninteractive sh -eu -c '
    policy=/usr/sbin/policy-rc.d
    log=$(mktemp)
    ours=
    trap "rm -f \"\$log\"; [ -z \"\$ours\" ] || rm -f $policy" EXIT
    trap "exit 130" INT TERM HUP
    if [ ! -e $policy ]; then
        ours=1
        printf "#!/bin/sh\nexit 101\n" >$policy
        chmod 755 $policy
    fi
    # Only what comes new with these packages is disabled, never a service that was there before.
    fresh=
    for unit in nginx.service docker.service docker.socket containerd.service etcd.service \
        haproxy.service; do
        [ -e /lib/systemd/system/$unit ] || [ -e /etc/systemd/system/$unit ] ||
            fresh="$fresh $unit"
    done
    get() {
        apt-get -qq -y -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@" >>"$log" 2>&1
    }
    # The lists may be absent or too old; mostly they are neither.
    get install --no-install-recommends "$@" || {
        get update && get install --no-install-recommends "$@"
    } || {
        cat "$log" >&2
        echo "install-deps: apt-get failed (above)." >&2
        echo "Check the network and /etc/apt/sources.list, or install by hand: $*" >&2
        exit 1
    }
    command -v systemctl >/dev/null || exit 0
    for unit in $fresh; do
        systemctl -q disable "$unit" >/dev/null 2>&1 || true
    done
' install-deps $missing
