--- The writer lease: one agent writes at a time, a second one stands by until it lapses.

local ctl = ngx.shared.tidegate_ctl

local max = math.max

local KEY = "lease"

local _M = {}

local ttl = 15


--- Sets for how many seconds a lease is given.
function _M.configure(seconds)
    ttl = seconds
end


--- Who holds the lease, and for how many seconds more; "" and 0 if nobody.
function _M.holder()
    local writer = ctl:get(KEY)
    if not writer then
        return "", 0
    end
    return writer, max(ctl:ttl(KEY) or 0, 0)
end


--- Takes or renews the lease for `writer`.
-- @return seconds that it is given for; or nil, the holder and its seconds left
function _M.take(writer)
    if ctl:add(KEY, writer, ttl) then
        return ttl
    end
    local holder, left = _M.holder()
    if holder == writer or holder == "" then
        ctl:set(KEY, writer, ttl)
        return ttl
    end
    return nil, holder, left
end


--- Gives the lease up, if `writer` holds it.
function _M.release(writer)
    if ctl:get(KEY) == writer then
        ctl:delete(KEY)
    end
end


return _M
