--- Where the current request has been sent to so far, and what came of it.
--
-- Why: nginx tells it in lists of text, one per variable, and Lua is asked for the next peer
-- without being told more. So this is read from there, on the paths of failure alone. Each internal
-- redirect begins a new group in these lists. Where there was no peer, the place stays empty, or
-- the address before it stands there again: in a group, none is asked twice.

local find = string.find
local gmatch = string.gmatch
local gsub = string.gsub
local huge = math.huge
local tonumber = tonumber
local var = ngx.var

-- How a balancer says that there is no peer, so that nginx makes a 502 of it. Its own way, `ERROR`,
-- is a 500, after which nginx closes the client's connection whatever it is answered.
local _M = {
    NO_PEER = ngx.DECLINED,     -- before the first try alone: after it, nginx would ask for ever
    NO_OTHER_PEER = -3,         -- NGX_BUSY; nginx logs it as "no live upstreams"
}


-- Elements of a list, over all groups, and where groups begin: the last one, and all as a set.
local function split(text)
    local list, count, first, starts = {}, 0, 1, {}
    for group in gmatch(gsub(text or "", " : $", "") .. " : ", "(.-) : ") do
        first = count + 1
        starts[first] = true
        for item in gmatch(group .. ", ", "(.-), ") do
            count = count + 1
            list[count] = item
        end
    end
    return list, first, starts
end


--- The attempts of the current request, oldest first.
--
-- @return list of `{address, status, connected, answered (a header has come), sent and received
--   (bytes), seconds}`; its `asked` is true while a next peer is asked for, or after there was
--   none; from `first` on they are of the last group
function _M.read()
    local text = var.upstream_addr
    local result = { asked = false, first = 1 }
    if not text then
        return result
    end
    local addresses, first, starts = split(text)
    local statuses = split(var.upstream_status)
    local connects, headers = split(var.upstream_connect_time), split(var.upstream_header_time)
    local sent, received = split(var.upstream_bytes_sent), split(var.upstream_bytes_received)
    local seconds = split(var.upstream_response_time)
    for place = 1, #addresses do
        local address = addresses[place]
        if place == first then
            result.first = #result + 1
        end
        if not starts[place] and address == addresses[place - 1] then
            result.asked = true
        elseif address ~= "" then
            result.asked = false
            result[#result + 1] = {
                address = address,
                status = tonumber(statuses[place]) or 0,
                connected = connects[place] ~= "-",
                answered = headers[place] ~= "-",
                sent = tonumber(sent[place]) or 0,
                received = tonumber(received[place]) or 0,
                seconds = tonumber(seconds[place]) or 0,
            }
        end
    end
    result.asked = result.asked or find(text, " : $") ~= nil
    return result
end


--- The peers that must not be asked again: those of the attempts from `first` on, and of earlier
-- ones those to which a byte was sent.
-- Those whose `refused` is set have not been asked.
-- @param before Unix time before which the earlier attempts were made
-- @return Unix time by `address:port`; a peer that has come up after it is another one
function _M.tried(made, first, before)
    local result = {}
    for place = 1, #made do
        if place >= first then
            result[made[place].address] = huge
        elseif made[place].sent > 0 and not made[place].refused then
            result[made[place].address] = before
        end
    end
    return result
end


return _M
