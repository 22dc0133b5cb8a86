--- The first peer, by id, that can take a request: the others stay idle while it has room.

local setmetatable = setmetatable

local _M = {}
local class = {}
class.__index = class


function class:next()
    return self.view.first
end


function class:search(ok, context)
    local first = self.view.first
    for index = first, first + self.view.count - 1 do
        if ok(context, index) then
            return index
        end
    end
    return nil
end


--- Picker for `view`; see `tidegate.pickers`.
function _M.new(view)
    return setmetatable({ view = view }, class)
end


return _M
