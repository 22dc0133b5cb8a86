--- Body of `balancer_by_lua` of peers that are spoken to over TLS.
--
-- Why: connections are kept per `upstream` block, and must never serve a request that asks for
-- another certificate, name or CA, or for none. So each such identity has a block of its own, which
-- calls this. The certificate that we show is read by nginx per connection, from a variable; so a
-- renewed one is in use at once.

local attempts = require "tidegate.attempts"
local balancer = require "tidegate.balancer"
local certificates = require "tidegate.certificates"

local exit = ngx.exit
local var = ngx.var

local _M = {}


--- Picks the peer.
-- @param identity `{id, trust, ca, certificate, key}`: `trust` names the CA's copy, "" where the
--   peer is not verified; `certificate` and `key` are paths, "" for none
function _M.balance(identity)
    local ok, certificate, key = certificates.backend(identity)
    if not ok then
        -- `hold` answers it.
        var.tidegate_unidentified = "1"
        return exit(attempts.NO_OTHER_PEER)
    end
    if certificate then
        var.tidegate_client_certificate = certificate
        var.tidegate_client_key = key
    end
    return balancer.balance()
end


return _M
