--- The peers of an opened upstream by their index: how nginx is to be told of one.
--
-- Why: choosing a peer, judging it and connecting to it are three modules' business, and each needs
-- its name. Names are made when they are first needed and kept with the version.

local codec = require "tidegate.codec"

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


return _M
