--- Looks up a host's addresses, in a thread with a Lua state of its own.
--
-- Why: the libc knows how this machine resolves names (its files, Docker's server) and blocks while
-- it asks; nginx's own resolver would have to be set up for it. A thread has none of nginx's API.

local ffi = require "ffi"
local posix = require "tidegate.posix"

local C = ffi.C
local cast = ffi.cast
local ffi_new = ffi.new

ffi.cdef([[
    struct tidegate_addrinfo {
        int flags; int family; int kind; int protocol; unsigned int length;
        unsigned char *address; char *name; struct tidegate_addrinfo *next;
    };
    int getaddrinfo(const char *host, const char *service, const void *hints,
                    struct tidegate_addrinfo **result);
    void freeaddrinfo(struct tidegate_addrinfo *result);
    const char *gai_strerror(int error);
]])

local AF_INET = 2
local AF_INET6 = 10
local SOCK_STREAM = 1

local _M = {}


--- The first address of `host`, IPv6 in brackets.
-- @return it; or "" and why there is none
function _M.address(host)
    local hints = ffi_new("struct tidegate_addrinfo")
    hints.kind = SOCK_STREAM
    local result = ffi_new("struct tidegate_addrinfo *[1]")
    local code = C.getaddrinfo(host, nil, hints, result)
    if code ~= 0 then
        return "", ffi.string(C.gai_strerror(code))
    end
    local found = ""
    local item = result[0]
    while item ~= nil and found == "" do
        local bytes = cast("const unsigned char *", item.address)
        if item.family == AF_INET then
            found = posix.format_address(4, bytes + 4)
        elseif item.family == AF_INET6 then
            found = "[" .. posix.format_address(6, bytes + 8) .. "]"
        end
        item = item.next
    end
    C.freeaddrinfo(result[0])
    return found, "has no address"
end


return _M
