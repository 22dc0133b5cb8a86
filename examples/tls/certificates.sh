#!/bin/sh
# Makes the certificates of the examples with openssl: `certificates.sh [DIRECTORY]`, by default
# `certs` beside this script. What is there already stays; remove the directory to begin anew.
#
#   ca.pem                  signs the certificates that clients see; give it to them
#   {shop,admin,vault}.example.com.pem, .key
#   backend-ca.pem          signs both sides of the connection to the backend
#   backend.pem, .key       the backend's, for the name backend.internal
#   proxy.pem, .key         what OpenResty shows the backend
set -eu
umask 077
directory=${1:-$(dirname "$0")/certs}
mkdir -p "$directory"
cd "$directory"

authority() { # authority NAME "COMMON NAME"
    [ -e "$1.pem" ] && return
    openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -subj "/CN=$2" \
        -addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign \
        -keyout "$1.key" -out "$1.pem" 2>/dev/null
}

certificate() { # certificate NAME AUTHORITY USAGE SUBJECT_ALT_NAME
    [ -e "$1.pem" ] && return
    openssl req -newkey rsa:2048 -nodes -subj "/CN=$1" -keyout "$1.key" -out "$1.csr" 2>/dev/null
    printf 'basicConstraints=CA:FALSE\nextendedKeyUsage=%s\nsubjectAltName=%s\n' "$3" "$4" >"$1.ext"
    openssl x509 -req -in "$1.csr" -CA "$2.pem" -CAkey "$2.key" -CAcreateserial -days 397 \
        -extfile "$1.ext" -out "$1.pem" 2>/dev/null
    rm -f "$1.csr" "$1.ext"
}

authority ca "Example CA"
authority backend-ca "Example backend CA"
for host in shop admin vault; do
    certificate "$host.example.com" ca serverAuth "DNS:$host.example.com"
done
certificate backend backend-ca serverAuth DNS:backend.internal
certificate proxy backend-ca clientAuth DNS:proxy.internal
echo "certificates are in $(pwd)"
