#!/bin/bash
# Builds the root file systems of the lab's base images and leaves them as tarballs.
#
#   rootfs.sh WORKDIR OUTDIR SUITE MIRROR SECURITY_MIRROR
#
# Nodes of the lab have no route out, so nothing can be pulled: the images start here. One minbase
# is bootstrapped, copied per image, and the copies are completed side by side. Runs in a mount
# namespace of its own (the caller sees to that), so that no mount survives it, however it ends.
set -euo pipefail

work=$1 out=$2 suite=$3 mirror=$4 security=$5
base=$work/base
export DEBIAN_FRONTEND=noninteractive LC_ALL=C PATH=/usr/sbin:/usr/bin:/sbin:/bin
unset TMPDIR

say() { printf 'rootfs: %s\n' "$*"; }

debootstrap --variant=minbase --include=ca-certificates "$suite" "$base" "$mirror"

# Security fixes too: the images must carry the versions a patched machine has.
cat >"$base/etc/apt/sources.list" <<LIST
deb $mirror $suite main
deb $mirror $suite-updates main
deb $security $suite-security main
LIST
cat >"$base/etc/apt/apt.conf.d/90lab" <<CONF
APT::Install-Recommends "false";
Acquire::Languages "none";
Acquire::Retries "3";
CONF
cat >"$base/etc/dpkg/dpkg.cfg.d/90lab" <<CONF
force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/man/*
path-exclude=/usr/share/locale/*
CONF
# No package may start a service while it is being installed: it would run on the host.
printf '#!/bin/sh\nexit 101\n' >"$base/usr/sbin/policy-rc.d"
chmod 755 "$base/usr/sbin/policy-rc.d"
cp -L /etc/resolv.conf "$base/etc/resolv.conf"
# A cleared environment, but for a proxy: nothing of the host's may end up in a package's set-up.
in_root() {
    local root=$1
    shift
    env -i PATH="$PATH" LC_ALL=C DEBIAN_FRONTEND=noninteractive HOME=/root \
        ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} \
        ${no_proxy:+no_proxy="$no_proxy"} chroot "$root" "$@"
}
in_root "$base" apt-get -qq update
in_root "$base" apt-get -qq -y dist-upgrade
say "minbase of $suite ready"

finish() { # finish NAME: slim the tree and write the tarball, whole or not at all
    local name=$1 root=$work/$1
    rm -rf "$root"/usr/share/{doc,man,locale,info}/* "$root"/var/lib/apt/lists/* \
        "$root"/var/cache/apt/* "$root"/var/cache/debconf/*-old "$root"/var/log/*.log \
        "$root"/var/log/apt "$root"/tmp/* "$root"/run/*
    umount "$root/proc"
    tar -C "$root" --numeric-owner --exclude='./dev/*' -cf "$out/.$name.tar.part" .
    mv "$out/.$name.tar.part" "$out/$name.tar"
    say "$name: $(du -m "$out/$name.tar" | cut -f1) MB"
}

prepare() { # prepare NAME PACKAGE...
    local name=$1 root=$work/$1
    shift
    cp -a "$base" "$root"
    mount -t proc proc "$root/proc"
    in_root "$root" apt-get -qq -y install "$@"
}

nginx_base() {
    prepare nginx-base nginx-light libnginx-mod-http-lua libnginx-mod-http-ndk lua-cjson \
        lua-resty-core lua-resty-lrucache openssl ca-certificates curl
    finish nginx-base
}

python_base() {
    prepare python-base python3 python3-pip python3-venv ca-certificates
    # What python:*-slim has: a plain `python`, and a pip that may install into the system.
    ln -s python3 "$work/python-base/usr/bin/python"
    rm -f "$work"/python-base/usr/lib/python3*/EXTERNALLY-MANAGED
    finish python-base
}

nginx_base >"$out/nginx-base.log" 2>&1 &
nginx=$!
python_base >"$out/python-base.log" 2>&1 &
python=$!
status=0
wait "$nginx" || { status=1; cat "$out/nginx-base.log"; }
wait "$python" || { status=1; cat "$out/python-base.log"; }
exit "$status"
