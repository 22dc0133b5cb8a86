--- The peers of an opened upstream by their index: how nginx is to be told of one.
--
-- Why: choosing a peer, judging it and connecting to it are three modules' business, and each needs
-- its name. Names are made when they are first needed and kept with the version.

local codec = require "tidegate.codec"
local posix = require "tidegate.posix"

local match = string.match
local tonumber = tonumber

local _M = {}


--- Host of a peer as nginx takes it.
function _M.host(upstream, index)
    local host = upstream.hosts[index]
    if not host then
        local peer = upstream.peers[index]
        host = codec.host(peer.family, peer.address)
        upstream.hosts[index] = host
    end
    return host
end


--- `address:port` of a peer, as nginx shows it in `$upstream_addr`.
function _M.key(upstream, index)
    return _M.host(upstream, index) .. ":" .. upstream.peers[index].port
end


--- Index of the peer that nginx shows as `address:port`; nil where it is none of `upstream`.
function _M.find(upstream, name)
    local index = upstream.found[name]
    if index == nil then
        local host, port = match(name, "^%[?(.-)%]?:(%d+)$")
        local family, bytes = posix.parse_address(host or "")
        index = family and codec.find(upstream.peers, upstream.head.count, family, bytes,
                                      tonumber(port)) or false
        upstream.found[name] = index
    end
    return index or nil
end


return _M
