--- The peer with the fewest requests in flight for its weight, over all workers.
--
-- Counts change with every request of every worker, so there is no order to keep: the peers are
-- looked at in turn, from the next one on. An idle one ends that at once, which is the common case,
-- and never more are looked at than is worth it: of thousands, the best of some hundred.

local load = require "tidegate.load"

local max = math.max
local random = math.random
local setmetatable = setmetatable
local sum = load.sum

local LOOKS = 1024      -- at a count of one worker, per pick
local MIN_PEERS = 16

local _M = {}
local class = {}
class.__index = class


function class:search(ok, context)
    local view = self.view
    local peers, first, count, uniform = view.peers, view.first, view.count, view.uniform
    local enough = max(MIN_PEERS, LOOKS / load.rows())
    local place = self.cursor + 1
    if place >= count then
        place = 0
    end
    self.cursor = place
    local best, lowest
    for step = 1, count do
        local peer = peers[first + place]
        local busy = sum(peer.cell)
        local score = (busy + 1) / peer.weight
        if (not best or score < lowest) and (not ok or ok(context, first + place)) then
            best, lowest = first + place, score
            if busy == 0 and uniform then
                return best
            end
        end
        if best and step >= enough then
            return best
        end
        place = place + 1
        if place == count then
            place = 0
        end
    end
    return best
end


function class:next()
    return self:search()
end


--- Picker for `view`; see `tidegate.pickers`.
function _M.new(view, previous)
    return setmetatable({
        view = view,
        cursor = (previous and previous.cursor or random(0, 65535)) % view.count,
    }, class)
end


return _M
