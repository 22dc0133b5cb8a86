--- Which requests go to the canary of an upstream instead.
--
-- Why: it is decided before any peer is looked for, by the request alone, so it stands alone. Must
-- not choose a peer.

local byte = string.byte
local gsub = string.gsub
local lower = string.lower
local md5_bin = ngx.md5_bin
local random = math.random
local var = ngx.var

local GOLDEN = 0.6180339887498949

local _M = {}


--- What an opened upstream with a canary in its policy needs; `before` is what the version before
-- had, if any.
function _M.new(policy, before)
    return {
        upstream = policy.upstream,
        share = policy.weight / 100,
        header = policy.header ~= "" and "http_" .. lower(gsub(policy.header, "-", "_")),
        header_value = policy.header_value ~= "" and policy.header_value,
        cookie = policy.cookie ~= "" and "cookie_" .. policy.cookie,
        position = before and before.position or random(),
    }
end


--- What the current request says: true it wants the canary, false it does not, nil nothing.
function _M.asked(canary)
    local value = canary.header and var[canary.header]
    if value then
        if canary.header_value then
            if value == canary.header_value then
                return true
            end
        elseif value == "always" then
            return true
        elseif value == "never" then
            return false
        end
    end
    value = canary.cookie and var[canary.cookie]
    if value == "always" then
        return true
    elseif value == "never" then
        return false
    end
    return nil
end


--- Whether it is the canary's turn, by its share of the requests that say nothing.
-- @param session what the request's session is told by, nil or empty where it has none: all
--   requests of one stay on one side
function _M.turn(canary, session)
    if session and session ~= "" then
        local high, low = byte(md5_bin(session), 1, 2)
        return high * 256 + low < canary.share * 65536
    end
    local position = (canary.position + GOLDEN) % 1
    canary.position = position
    return position < canary.share
end


return _M
